"""Tests of other packages: a pytest plugin, and the rules of the contract as cases."""
