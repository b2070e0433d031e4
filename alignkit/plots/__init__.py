"""Pictures, one style: `plot_*(…, ax=None) -> Axes`."""

from alignkit.metrics import METRICS
from alignkit.plots.diagrams import plot_advantage_tokens, plot_clip, plot_relay
from alignkit.plots.evaluation import (
    plot_gold_vs_proxy,
    plot_intervals,
    plot_intervals_panels,
    plot_margin_accuracy,
    plot_refusals,
    plot_reliability,
    plot_reward_kl_plane,
    plot_tradeoff,
)
from alignkit.plots.shift import plot_behaviour, plot_histogram, plot_kl_by_class, plot_kl_by_position, plot_next_token
from alignkit.plots.style import (
    BEHAVIOUR_FACES,
    BLUE,
    DASH_DOT,
    DASHED,
    DOTTED,
    EDGE,
    FOR_TEXT,
    GREEN,
    GRID,
    INK,
    KNOWN,
    MUTED,
    ORANGE,
    PURPLE,
    SERIES,
    SKY,
    VERMILION,
    YELLOW,
    Chart,
    Picture,
    describe,
    save_figure,
)
from alignkit.plots.training import PPO_PANELS, plot_dpo_logps, plot_margins, plot_metrics, plot_ppo_panels
from alignkit.plots.world import plot_annotators, plot_floor, plot_gold_by_sentence, plot_sampling_error

__all__ = [
    "BEHAVIOUR_FACES", "BLUE", "DASHED", "DASH_DOT", "DOTTED", "EDGE", "FOR_TEXT", "GREEN", "GRID", "INK", "KNOWN",
    "METRICS", "MUTED", "ORANGE", "PPO_PANELS", "PURPLE", "SERIES", "SKY", "VERMILION", "YELLOW", "Chart", "Picture",
    "describe", "plot_advantage_tokens", "plot_annotators", "plot_behaviour", "plot_clip", "plot_dpo_logps",
    "plot_floor", "plot_gold_by_sentence", "plot_gold_vs_proxy", "plot_histogram", "plot_intervals",
    "plot_intervals_panels", "plot_kl_by_class", "plot_kl_by_position", "plot_margin_accuracy", "plot_margins",
    "plot_metrics", "plot_next_token", "plot_ppo_panels", "plot_refusals", "plot_relay", "plot_reliability",
    "plot_reward_kl_plane", "plot_sampling_error", "plot_tradeoff", "save_figure",
]
