"""verl's reward (`reward.custom_reward_function.path`): the same judge as on OpenRLHF."""

from typing import Any

from recipes.quickstart.reward import is_correct


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any
) -> float:
    """1.0 for right, 0.0 for wrong."""
    return float(is_correct(solution_str, ground_truth))
