"""Dispatch and combine over collectives of torch.distributed."""
