"""Models of which a process holds a shard: ``torch.distributed.fsdp.fully_shard``, in place."""
