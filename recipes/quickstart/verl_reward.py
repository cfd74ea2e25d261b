"""verl's reward of the quickstart (`reward.custom_reward_function.path`)."""

from recipes.quickstart.reward import compute_score

__all__ = ["compute_score"]
