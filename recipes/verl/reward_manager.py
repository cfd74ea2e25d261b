"""verl's reward manager, giving the reward the special tokens too, as OpenRLHF does.

Qwen2.5's base models have `<|endoftext|>` as their only eos, and may go on after `<|im_end|>`.
verl's own manager leaves both out of the text, so the reward could not tell where an answer ended.
verl loads this file by its path (`reward.reward_manager.module.path`).
"""

from typing import Any

from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager


class Whole:
    """A tokenizer that leaves no token out."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def decode(self, ids: Any, **_: Any) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class WholeRewardManager(NaiveRewardManager):
    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **rest: Any) -> None:
        super().__init__(config, Whole(tokenizer), compute_score, **rest)
