"""Faults that a case can inject, one module per stage; cases without faults import none of them."""
