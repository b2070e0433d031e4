"""A pretrained Llama that nobody here wrote: PPO with a Python reward (VADER sentiment) makes its stories happier."""

import pytest
import torch

from alignkit.configs import PPOConfig
from alignkit.models.loading import load_policy
from alignkit.ppo import PPOState, ppo
from alignkit.reward import load_reward

OPENINGS = [
    "Once upon a time, there was a little girl named Lily.",
    "One day, a dog went to the park.",
    "Tom had a red ball.",
    "The old man lived in a small house.",
    "A bird sat on a tree.",
    "Mia was sad because",
    "Ben and Sam were friends.",
    "It was raining and",
]


def sentiment(prompts: list[str], responses: list[str]) -> list[float]:
    """VADER's compound score, −1 to 1, of each response; the reward that the test names as
    tests.test_real_model:sentiment.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return [analyser.polarity_scores(text)["compound"] for text in responses]


@pytest.mark.shared
def test_ppo_with_a_python_reward_raises_sentiment_and_reports_kl(shared):
    policy, tokenizer = load_policy(shared / "models" / "stories260K")
    config = PPOConfig(
        iterations=16,
        prompts_per_iteration=64,
        minibatch_size=32,
        max_new_tokens=24,
        epochs=2,
        learning_rate=3e-4,
        critic_learning_rate=1e-3,
        kl_coef=0.01,
    )
    state = PPOState.start(policy, tokenizer, load_reward("tests.test_real_model:sentiment"), OPENINGS, config)
    stats = list(ppo(state, config))
    before, after = (torch.tensor([s.score for s in part]).mean() for part in (stats[:3], stats[-3:]))
    assert after > before + 0.2
    assert stats[0].kl_to_ref == pytest.approx(0, abs=1e-3) and stats[-1].kl_to_ref > 0.1
    assert stats[-1].kl_to_ref_k3 > 0.1


@pytest.mark.shared
def test_ppo_in_bf16_begins_though_single_tokens_are_scored_a_quarter_of_a_nat_apart(shared):
    policy, tokenizer = load_policy(shared / "models" / "stories260K", device="cpu")
    config = PPOConfig(iterations=1, prompts_per_iteration=32, minibatch_size=32, epochs=1, max_new_tokens=48,
                       precision="bf16")
    state = PPOState.start(policy, tokenizer, lambda prompts, responses: [0.0] * len(prompts), OPENINGS, config)
    (stats,) = ppo(state, config)
    assert stats.ratio_first == pytest.approx(1, abs=0.01) and abs(stats.kl_to_ref) < 0.5
