"""How many replicas: as many as the samples that wait or are drawn need, within what a model's tags allow.

Ray's controller runs the policy, and gets it by value: it uses nothing of this project.
"""

from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

SAMPLES = "samples"
"""What replicas report: how many samples they draw or hold in their queue."""
SAMPLES_PER_REPLICA = 64
"""As many as an engine has slots."""


def by_samples(context: Any) -> tuple[float, dict[str, Any]]:
    """Ask for a replica for each slotful of samples, and for one at least while there are requests."""
    held = sum(context.aggregated_metrics.get("samples", {}).values())
    return max(held / 64, 1.0 if context.total_num_requests else 0.0), {}


def autoscaling(least: int, most: int) -> AutoscalingConfig:
    """Describe to Ray Serve how a deployment grows and shrinks between two numbers of replicas."""
    return AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        upscale_delay_s=2.0,
        downscale_delay_s=60.0,
        downscale_to_zero_delay_s=300.0,
        look_back_period_s=11.0,
        policy=AutoscalingPolicy(policy_function=by_samples),  # type: ignore[no-untyped-call]
    )


def parse_replicas(text: str) -> tuple[int, int]:
    """Read a number of replicas, "2", or least and most, "0:4".

    Raises:
        ValueError: it is neither.
    """
    least, _, most = text.partition(":")
    try:
        bounds = int(least), int(most or least)
    except ValueError:
        bounds = (-1, -1)
    if not (0 <= bounds[0] <= bounds[1] and bounds[1] > 0):
        raise ValueError(
            f"replicas={text!r} must be a number, such as 2, or least and most of them, such as 0:4"
        )
    return bounds
