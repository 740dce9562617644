"""Memory that a function needs, by torch's profiler."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run) -> int:
    """Most bytes that were allocated at once while `run` ran, over those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    events = recorded.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    del result
    return peak
