"""Learn, run and see LLM alignment: the public names, from the modules that define them, loaded when first used.

The loops `alignkit.ppo.ppo` and `alignkit.dpo.dpo`, and `alignkit.evaluate.evaluate`, bear their modules' names: import
them from there.
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "configs": ["DPOConfig", "PPOConfig", "RewardConfig", "SFTConfig", "preset"],
    "data.encoding": ["ChatText", "encode_pair", "encode_pairs", "encode_text"],
    "data.ends": ["end_after", "end_ids"],
    "data.labels": ["ChoiceLog", "choice_items"],
    "data.rows": ["check", "load_rows"],
    "desk.tiny": ["desk_tokenizer", "phrase_ids", "tiny_policy", "tiny_reward_model"],
    "desk.world": [
        "ANNOTATORS", "Annotator", "BEHAVIOURS", "DUAL_VERBS", "KINDS", "MAX_PHRASES", "PHRASES", "Prompt",
        "SENTENCES", "World", "render",
    ],
    "dpo": ["DPOState", "DPOStats", "Pairs", "dpo_iteration", "dpo_step", "with_reference"],
    "errors": [
        "AlignkitError", "DataError", "InvariantError", "ManifestError", "MissingExtra", "NonFinite", "NotebookFailed",
        "OutOfMemory", "ParameterError", "RunError", "RunInUse",
    ],
    "evaluate.adviser": ["advice", "chance_warning"],
    "evaluate.advice_record": ["ADVISERS", "FREEZING", "AdviceRecord", "AdvisedWorld", "load_advice"],
    "evaluate.advised_run": ["advise_run"],
    "evaluate.claims": ["Claim", "Claims", "load_claims", "verdict"],
    "evaluate.comparison": ["Comparison", "compare", "compare_directories"],
    "evaluate.demonstrators": [
        "SPEAKERS", "demonstrator_behaviours", "demonstrator_entropy", "demonstrator_logps",
        "demonstrator_probabilities",
    ],
    "evaluate.dials": ["Dials", "load_dials"],
    "evaluate.evaluation": ["Evaluation", "EvaluationSet", "difference", "evaluation_set", "win_rate"],
    "evaluate.decision": ["DECISION_RULES", "DECISIONS", "Decision", "decide", "warnings_of"],
    "evaluate.failures": ["FAILURE_CHECKS", "Failures", "StoredRun", "load_failures"],
    "evaluate.ivison": ["Ivison", "load_ivison"],
    "evaluate.knowledge": ["Knowledge", "load_knowledge", "pass_at_k", "share_of_right"],
    "evaluate.readings": ["Reading", "clustered_mean", "reading", "readings_of"],
    "evaluate.refusals": ["over_refusal", "read_refusal_prompts", "refusal_class"],
    "evaluate.reward_model": ["retrain", "reward_report"],
    "evaluate.reward_table": ["best_of_n_gold", "reward_model_table"],
    "evaluate.rewardbench": ["desk_bench", "read_rewardbench", "rewardbench", "write_rewardbench"],
    "evaluate.shift": ["measure_shift"],
    "evaluate.suites": ["run_suites"],
    "evaluate.unpacking": ["Unpacking", "decompose", "load_unpacking"],
    "evaluate.wins": ["length_controlled", "win_rates"],
    "exact.causes": ["Causes", "load_causes"],
    "exact.enumeration": ["response_logps"],
    "exact.gradient": ["exact_gradient"],
    "exact.prompts": ["enumerate_world"],
    "exact.responses": ["Responses", "response_space"],
    "exact.sampled": ["sampled_best_of_n", "sampled_optimum"],
    "exact.sweep": ["Sweep", "load_sweep"],
    "exact.truth": ["Frontier", "best_of_n", "frontier", "gap", "optimum", "response_kl"],
    "followers": ["on_processes"],
    "formulas.intervals": ["Estimate", "mean_estimate", "share_estimate"],
    "formulas.kl": ["exact_kl", "k1", "k2", "k3"],
    "formulas.losses": [
        "adapt_kl_coef", "clipped", "dpo_loss", "gae", "grpo_advantages", "implicit_reward", "policy_loss",
        "rloo_advantages", "token_rewards", "value_loss",
    ],
    "formulas.randomness": ["seeded"],
    "formulas.tokens": ["entropy", "masked_mean", "sequence_logps", "token_logprobs", "whiten"],
    "forward.reading": ["response_logits", "response_logprobs", "token_values"],
    "forward.rollout": [
        "Rollout", "decode_responses", "encode_prompts", "encode_rows", "full_ids", "rollout_from_ids", "to_device",
    ],
    "forward.sampling": ["generate_texts", "sample"],
    "jobs.notebooks": ["course", "run_notebook"],
    "jobs.report": ["build_report"],
    "models.adapters": ["add_lora", "frozen_copy", "reference_policy"],
    "models.heads": ["reward_model_from", "value_model_from"],
    "models.identity": ["weights_hash"],
    "models.loading": ["load_policy", "load_reward_model", "save_model"],
    "optim": ["adamw"],
    "ppo": ["PPOBatch", "PPOStats", "ppo_iteration", "ppo_step", "ran_away"],
    "ppo_state": ["PPOState"],
    "publish.card": ["model_card", "write_card"],
    "reward": ["RewardScorer", "load_reward", "train_reward_model"],
    "runs.checkpoints": ["Checkpoints"],
    "runs.frozen": ["checkpoint_hash", "freeze", "lineage", "verify"],
    "runs.records": ["start_run", "versions", "write_results"],
    "runs.stage_folders": ["stage_folder"],
    "safe_text": ["visible"],
    "sft": ["train_sft"],
    "storage": ["data_hash", "settings", "write_json"],
    "sweeps.curves": ["sweep_curves"],
    "sweeps.results": ["SweepResults", "by_setting", "load_results", "ranking", "ranking_words"],
    "sweeps.sampled": ["sampled_frontier"],
    "task": ["Task", "desk_task", "file_task", "load_task"],
    "trainer": ["step_seconds"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'alignkit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"alignkit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
