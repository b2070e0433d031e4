"""Break the package on purpose, one place at a time, and see that a test notices: `make mutants`.

Each mutant is a mistake that somebody has made, or could make, and the one quick test that has to fail for it. A mutant
that survives is a hole in the tests. Every one runs in a copy of the package, so the working tree is never touched.

    python -m tests.mutants              all of them (first, that all the tests pass as long as nothing is broken)
    python -m tests.mutants dpo.py gae   those whose file or reason contains one of the words
"""

import argparse
import itertools
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds for one mutant
PROCESSES = multiprocessing.get_context("forkserver")  # what is imported there, every mutant has at once
PROCESSES.set_forkserver_preload(["pytest", "numpy", "torch.optim", "transformers.models.phi.modeling_phi", "peft"])


@dataclass(frozen=True)
class Mutant:
    """In alignkit/`file`, `old` (found exactly once, whatever the white space) becomes `new`; `test` has to fail."""

    file: str
    old: str
    new: str
    reason: str
    test: str


MUTANTS = [
    Mutant("data/own_template.py", "prompts[place] = ChatText(texts[0], messages, own)", "pass",
           "a reward model of another family reads the policy's template",
           "test_own_template.py::test_it_reads_of_a_policy_s_conversation_the_ids_that_it_reads_of_its_own"),
    Mutant("data/own_template.py", "and not special.search(responses[place])", "",
           "special tokens that a policy spells out become real for another reward model",
           "test_own_template.py::test_special_tokens_that_a_policy_spells_out_stay_text_in_the_other_family_too"),
    Mutant("data/layouts.py", "sum(aspects.values()) / len(aspects)", "max(aspects.values())",
           "the best aspect of an answer counts instead of their mean",
           "test_real_inputs.py::test_raw_ultrafeedback_becomes_pairs_by_the_mean_of_its_aspects_or_by_one_of_them"),
    Mutant("data/rows.py", "sum(twice) >= 0.9 * len(twice)", "any(twice)",
           "one reply that echoes its prompt loses its beginning",
           "test_real_inputs.py::test_replies_that_echo_a_short_prompt_in_some_rows_alone_stay_as_they_are"),
    Mutant("jobs/lab.py", "if not untouched:", "if False:", "make lab overwrites a student's notebook",
           "test_lab.py::test_a_changed_copy_of_an_older_notebook_is_kept_and_named_and_an_untouched_one_is_replaced"),
    Mutant("jobs/report.py", "growth.low <= 0", "growth.value <= 0",
           "a rise of over-refusal is told without its interval",
           "test_report.py::test_three_sentences_come_first_and_over_refusal_that_rose_is_told_in_red"),
    Mutant("runs/records.py", "facts |= reading", "pass", "a run goes on with data that is read in another way",
           "test_real_inputs.py::test_columns_may_be_corrected_until_a_stage_has_finished_and_not_after"),
    # nothing is lost
    Mutant("runs/checkpoints.py", "if written.get(name) != file_hash(folder / name):",
           "if name not in written:", "a torn checkpoint is taken for whole",
           "faults/test_training.py::test_10_11_a_torn_checkpoint_is_skipped_by_name_and_the_one_before_it_taken"),
    Mutant("runs/checkpoints.py", "if was.get(name) != now.get(name)]", "if False]",
           "a checkpoint of other settings is gone on from",
           "faults/test_training.py::test_17_a_checkpoint_of_another_run_is_refused_with_the_keys_that_differ"),
    Mutant("runs/checkpoints.py", "for older in self._folders()[KEPT:]:", "for older in self._folders()[KEPT - 1:]:",
           "one checkpoint is kept, and none is left if it is torn",
           "faults/test_training.py::test_01_the_newest_two_checkpoints_stay"),
    Mutant("runs/stage_folders.py", 'return (folder / "results.json").exists() and not checkpoint_folders(folder)',
           'return (folder / "results.json").exists()', "a stage that a killed job left is taken for finished",
           "faults/test_stages.py::test_a_stage_whose_checkpoints_are_there_is_not_finished_and_goes_on_in_its_place"),
    Mutant("runs/stage_folders.py", 'set_aside(run, place, "made again")', "shutil.rmtree(place)",
           "a finished stage is deleted when it is made again",
           "faults/test_stages.py::test_a_rerun_that_succeeds_sets_the_old_stage_aside_with_date_parameters_and_notebook"),
    Mutant("folders.py", "with contextlib.suppress(OSError), locked(leftover):", "with contextlib.suppress(OSError):",
           "a folder that a living process writes is swept",
           "faults/test_stages.py::test_15_what_a_killed_process_left_is_swept_unless_somebody_holds_it_or_it_has_no_marker"),
    Mutant("optim.py", "        state.load_state_dict(before)\n        raise", "        raise",
           "half an iteration stays in the weights",
           "faults/test_training.py::test_25_a_gradient_that_is_not_finite_in_the_second_minibatch_takes_the_first_back"),
    Mutant("ppo.py", "check_sampler(rollout, old_logprobs, iteration=state.iteration, bf16=bf16)", "pass",
           "sampler and trainer are compared at the first iteration only",
           "faults/test_training.py::test_26_a_sampler_that_is_not_the_policy_is_caught_at_every_iteration"),
    Mutant("ppo.py", "if stats.kl_to_ref <= config.kl_limit:", "if True:", "KL may run away",
           "faults/test_training.py::test_28_a_run_whose_kl_runs_away_stops_by_default_and_says_what_to_do"),
    Mutant("trainer.py", 'self.optimizer.load_state_dict(self.saved["optimizer"])', "pass",
           "a resumed training begins with a new optimiser",
           "faults/test_training.py::test_01_02_a_killed_run_ends_with_the_same_bytes_as_one_that_was_not[sft]"),
    # tokens and KL
    Mutant("formulas/tokens.py",
           "kept = torch.where(mask, values, 0.0)", "kept = values", "padding counts in a masked mean",
           "test_tokens.py::test_what_lies_outside_the_mask_never_counts"),
    Mutant("formulas/tokens.py", "return kept.sum() / mask.sum().clamp(min=1)", "return kept.mean()",
           "a masked mean divides by the padding too", "test_tokens.py::test_what_lies_outside_the_mask_never_counts"),
    Mutant("formulas/tokens.py", "centred = torch.where(mask, values - mean, 0.0)", "centred = values - mean",
           "whitening without the mask", "test_tokens.py::test_whitened_values_have_mean_0_and_variance_1"),
    Mutant("formulas/tokens.py", "return scaled if shift_mean else", "return scaled if not shift_mean else",
           "whitening's flag inverted (torchtune)", "test_tokens.py::test_whitened_values_have_mean_0_and_variance_1"),
    Mutant("formulas/tokens.py", "return torch.where(response_mask, logprobs, 0.0).sum(-1)", "return logprobs.sum(-1)",
           "log-probs of padding in a response's", "test_tokens.py::test_what_lies_outside_the_mask_never_counts"),
    Mutant("formulas/tokens.py", "-torch.where(logprobs > -80", "torch.where(logprobs > -80", "sign of the entropy",
           "test_tokens.py::test_entropy_of_a_uniform_choice_is_log_n_also_with_impossible_tokens"),
    Mutant("formulas/kl.py",
           "return logprobs - ref_logprobs", "return ref_logprobs - logprobs", "k1 with its arguments swapped",
           "test_tokens.py::test_k1_and_k3_are_unbiased_for_samples_of_the_first_argument_and_k2_is_not"),
    Mutant("formulas/kl.py", "log_ratio = ref_logprobs - logprobs", "log_ratio = logprobs - ref_logprobs",
           "k3 with its arguments swapped (rlhf-book)",
           "test_tokens.py::test_k1_and_k3_are_unbiased_for_samples_of_the_first_argument_and_k2_is_not"),
    Mutant("formulas/kl.py", "torch.expm1(log_ratio) - log_ratio", "torch.exp(log_ratio) - 1 - log_ratio",
           "k3 that rounds below 0", "test_tokens.py::test_k3_is_never_negative_not_even_where_float32_rounds"),
    # PPO
    Mutant("formulas/losses.py", "label_smoothing * flipped) / (1 - 2 * label_smoothing)", "label_smoothing * flipped)",
           "the robust loss is not divided by 1 − 2ε",
           "test_dpo.py::test_the_robust_loss_of_flipped_labels_is_on_average_the_loss_of_the_right_ones"),
    Mutant("formulas/losses.py", "* kept - label_smoothing * flipped", "* kept + label_smoothing * flipped",
           "the robust loss is cDPO's",
           "test_dpo.py::test_the_robust_loss_of_flipped_labels_is_on_average_the_loss_of_the_right_ones"),
    Mutant("formulas/losses.py", "-kl_coef * k1(logprobs, ref_logprobs)", "kl_coef * k1(logprobs, ref_logprobs)",
           "KL is rewarded instead of charged",
           "test_ppo.py::test_token_rewards_charge_kl_everywhere_and_add_the_score_once_at_the_last_token"),
    Mutant("formulas/losses.py", "last = (response_mask.sum(1) - 1).clamp(min=0)",
           "last = response_mask.sum(1).clamp(max=response_mask.shape[1] - 1)",
           "the score in the slot after the last token (TRL)",
           "test_ppo.py::test_token_rewards_charge_kl_everywhere_and_add_the_score_once_at_the_last_token"),
    Mutant("formulas/losses.py", "next_value = values[:, t + 1] if", "next_value = values[:, t] if",
           "GAE looks at the same value twice",
           "test_ppo.py::test_gae_equals_its_definition_on_ragged_responses"),
    Mutant("formulas/losses.py",
           "following = torch.where(response_mask[:, t], delta + gamma * gae_lambda * following, 0.0)",
           "following = delta + gamma * following", "GAE without lambda and mask",
           "test_ppo.py::test_gae_equals_its_definition_on_ragged_responses"),
    Mutant("ppo_state.py", 'optimizer.load_state_dict(saved[f"{name}_optimizer"])', "pass",
           "a rewound run keeps the moments of the branch that it left",
           "test_ppo.py::test_a_saved_state_goes_on_as_the_run_did_also_in_a_fresh_run"),
    Mutant("ppo_state.py", 'self.iteration, self.kl_coef, self.whole = saved["iteration"], saved["kl_coef"], True',
           'self.iteration, self.whole = saved["iteration"], True', "a rewound run keeps the adapted price of KL",
           "test_ppo.py::test_a_saved_state_goes_on_as_the_run_did_also_in_a_fresh_run"),
    Mutant("formulas/losses.py", "return advantages, advantages + values", "return advantages, advantages",
           "returns without the values", "test_ppo.py::test_gae_equals_its_definition_on_ragged_responses"),
    Mutant("formulas/losses.py", "-torch.minimum(ratio", "-torch.maximum(ratio", "max for min in the surrogate",
           "test_ppo.py::test_policy_loss_equals_a_slow_reference_and_its_gradient_is_zero_exactly_where_clipped"),
    Mutant("formulas/losses.py", "return -torch.minimum(ratio", "return torch.minimum(ratio", "sign of the surrogate",
           "test_ppo.py::test_policy_loss_at_ratio_1_has_the_policy_gradient"),
    Mutant("formulas/losses.py", "ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio.clamp(max=1 + clip_range)",
           "clipped on one side only",
           "test_ppo.py::test_policy_loss_equals_a_slow_reference_and_its_gradient_is_zero_exactly_where_clipped"),
    Mutant("formulas/losses.py",
           "((ratio > 1 + clip_range) & (advantages > 0))", "((ratio > 1 + clip_range) & (advantages < 0))",
           "the clip fraction counts the wrong side",
           "test_ppo.py::test_policy_loss_equals_a_slow_reference_and_its_gradient_is_zero_exactly_where_clipped"),
    Mutant("formulas/losses.py", "0.5 * torch.maximum((values - returns)", "0.5 * torch.minimum((values - returns)",
           "min for max in the value loss", "test_ppo.py::test_value_loss_equals_a_slow_reference"),
    Mutant("formulas/losses.py", "kl_coef * (1 + min(", "kl_coef * (1 - min(", "the adaptive coefficient runs away",
           "test_ppo.py::test_the_adaptive_controller_is_zieglers"),
    # RLOO, GRPO and a KL in the loss
    Mutant("formulas/losses.py", "return (groups - others).flatten()", "return (others - groups).flatten()",
           "RLOO makes the worse response likelier",
           "test_without_a_critic.py::test_rloo_is_the_distance_from_the_group_s_mean_times_n_over_n_minus_1"),
    Mutant("formulas/losses.py", "others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)",
           "others = groups.mean(1, keepdim=True)", "RLOO's baseline contains the response itself",
           "test_without_a_critic.py::test_rloo_is_the_distance_from_the_group_s_mean_times_n_over_n_minus_1"),
    Mutant("formulas/losses.py", "centred = groups - groups.mean(1, keepdim=True)",
           "centred = groups.mean(1, keepdim=True) - groups", "GRPO makes the worse response likelier",
           "test_without_a_critic.py::"
           "test_group_advantages_sum_to_0_and_do_not_see_what_a_prompt_adds_to_all_its_rewards"),
    Mutant("formulas/losses.py", "torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-8)",
           "torch.rsqrt(centred.square().mean() + 1e-8)", "GRPO divides by the batch's standard deviation",
           "test_without_a_critic.py::test_grpo_standardises_and_does_not_see_a_prompt_s_scale_and_rloo_does"),
    Mutant("formulas/losses.py", "torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-8)",
           "torch.rsqrt(centred.square().mean(1, keepdim=True))", "equal rewards in a group are divided by 0",
           "test_without_a_critic.py::test_equal_rewards_in_a_group_give_0_and_no_nan"),
    Mutant("formulas/losses.py", "return totals.view(-1, samples)", "return totals.view(samples, -1).T",
           "responses to different prompts are compared",
           "test_without_a_critic.py::test_an_iteration_compares_the_total_rewards_of_the_responses_to_one_prompt"),
    Mutant("ppo.py", "advantages = of_group(rewards.sum(1), config.samples_per_prompt)",
           "advantages = of_group(rewards.max(1).values, config.samples_per_prompt)", "the KL is not in RLOO's reward",
           "test_without_a_critic.py::test_rloo_s_expected_gradient_is_that_of_the_objective"),
    Mutant("ppo.py", "loss = loss + _kl_coef(state, config) * masked_mean(penalty, mask)",
           "loss = loss + masked_mean(penalty, mask)", "kl_coef does not weigh the KL in the loss",
           "test_without_a_critic.py::test_a_step_is_that_of_a_slow_loop_over_tokens"),
    Mutant("ppo.py", "loss = loss + _kl_coef(state, config) * masked_mean(penalty, mask)",
           "loss = loss + config.kl_coef * masked_mean(penalty, mask)", "target_kl does not reach the KL in the loss",
           "test_without_a_critic.py::test_kl_coef_is_the_price_of_a_nat_in_the_loss_and_target_kl_adapts_it"),
    Mutant("ppo.py", "ESTIMATORS[config.kl_penalty](logprobs, batch.ref_logprobs)",
           "ESTIMATORS[config.kl_penalty](batch.ref_logprobs, logprobs)", "the arguments of k3 in the loss swapped",
           "test_without_a_critic.py::test_k3_in_the_loss_has_the_gradient_of_the_kl_in_the_other_direction"),
    Mutant("ppo.py", 'charged = state.kl_coef if config.kl_penalty == "reward" else 0.0', "charged = state.kl_coef",
           "the KL is charged in the rewards and in the loss",
           "test_without_a_critic.py::test_an_iteration_compares_the_total_rewards_of_the_responses_to_one_prompt"),
    Mutant("ppo_state.py", 'if ("critic" in saved) != (self.critic is not None):', "if False:",
           "a run without a critic goes on from one that had one",
           "test_without_a_critic.py::"
           "test_what_a_run_with_a_critic_saved_is_refused_by_one_without_and_the_other_way_round"),
    Mutant("ppo.py", "token_values(state.critic, *full_ids(rollout), mask.shape[1])",
           "token_values(state.critic, *full_ids(rollout), mask.shape[1]).roll(1, 1)",
           "the critic reads one position early",
           "test_ppo_step.py::test_an_iteration_hands_its_steps_the_numbers_of_a_slow_reference"),
    Mutant("ppo.py", "config.missing_eos_penalty * (~rollout", "2 * config.missing_eos_penalty * (~rollout",
           "the missing-EOS penalty charged twice",
           "test_ppo.py::test_missing_eos_penalty_is_charged_once_and_only_without_eos"),
    Mutant("ppo.py", "* (~rollout.finished)", "* (rollout.finished)", "EOS is punished",
           "test_ppo.py::test_missing_eos_penalty_is_charged_once_and_only_without_eos"),
    Mutant("ppo.py", "rewards = whiten(rewards, mask, shift_mean=False)", "rewards = whiten(rewards, mask)",
           "whitened rewards lose their mean",
           "test_ppo_step.py::test_an_iteration_hands_its_steps_the_numbers_of_a_slow_reference"),
    Mutant("ppo.py", "return whiten(advantages, mask) if config.whiten_advantages else advantages, returns",
           "return advantages, whiten(returns, mask) if config.whiten_advantages else returns",
           "the returns whitened instead of the advantages",
           "test_ppo.py::test_gamma_and_lambda_and_whitening_reach_the_advantages"),
    Mutant("ppo.py", "read_responses(state.policy, rollout, config.temperature,",
           "read_responses(state.policy, rollout, 1.0,", "temperature in the sampler only",
           "test_ppo.py::test_temperature_is_that_of_sampling_and_of_scoring"),
    Mutant("ppo.py", "loss + config.value_coef * critic_loss", "loss + critic_loss", "value_coef does nothing",
           "test_ppo_step.py::test_value_coef_weighs_the_value_loss_in_a_shared_trunk_and_nothing_else"),
    Mutant("ppo.py", "values = score(hidden.to(score.weight.dtype))", "values = score(hidden.detach())",
           "a shared critic does not train the trunk",
           "test_ppo_step.py::test_value_coef_weighs_the_value_loss_in_a_shared_trunk_and_nothing_else"),
    Mutant("ppo.py", "ref_logprobs = response_logprobs(state.ref_policy, part, config.temperature)",
           "ref_logprobs = response_logprobs(state.ref_policy, part)", "the reference is read at another temperature",
           "test_ppo_step.py::test_an_iteration_hands_its_steps_the_numbers_of_a_slow_reference"),
    Mutant("ppo.py", "loss - config.entropy_coef", "loss + config.entropy_coef", "sign of the entropy bonus",
           "test_ppo_step.py::test_a_step_is_that_of_a_slow_loop_over_tokens"),
    Mutant("ppo.py", "(config.ptx_coef * ptx).backward()", "(-config.ptx_coef * ptx).backward()", "sign of ptx",
           "test_ppo_step.py::test_a_step_is_that_of_a_slow_loop_over_tokens"),
    Mutant("ppo.py", "advantages, config.clip_range), mask)", "advantages, config.clip_range), mask | True)",
           "the surrogate averaged over padding",
           "test_ppo_step.py::test_padding_a_minibatch_changes_neither_weights_nor_measurements"),
    Mutant("ppo.py", "if not torch.isfinite(norm + critic_norm + loss + critic_loss)", "if False", "steps into NaN",
           "test_ppo.py::test_a_loss_that_is_not_finite_leaves_the_weights"),
    Mutant("forward/invariants.py", "if not gap <= tolerance", "if False", "a wrong reference goes unseen",
           "test_ppo.py::test_a_wrong_reference_stops_the_run_and_says_so"),
    Mutant("ppo.py", "which = torch.arange(n) % len(strata)", "which = torch.zeros(n, dtype=torch.long)",
           "prompts from the first class only", "test_ppo.py::test_prompts_are_drawn_evenly_from_the_strata"),
    # DPO
    Mutant("formulas/losses.py", "- implicit_reward(policy_rejected_logps", "+ implicit_reward(policy_rejected_logps",
           "sign of the margin", "test_dpo.py::test_what_depends_on_the_prompt_alone_cancels"),
    Mutant("formulas/losses.py", "return beta * (logps - ref_logps)", "return beta * logps", "the reference ignored",
           "test_dpo.py::test_each_loss_equals_a_slow_reference"),
    Mutant("dpo.py", "[*logps, part.ref_chosen_logps, part.ref_rejected_logps]",
           "[*logps, part.ref_rejected_logps, part.ref_chosen_logps]", "the reference's log-probs swapped",
           "test_dpo.py::test_statistics_are_of_before_the_step_and_make_sense"),
    Mutant("formulas/losses.py", "return -(1 - label_smoothing) * F.logsigmoid(margin)", "return -F.logsigmoid(margin)",
           "cDPO without (1 − ε)",
           "test_dpo.py::test_cdpo_is_at_rest_where_sigma_of_the_margin_is_one_minus_epsilon"),
    Mutant("formulas/losses.py",
           "(margin / beta - 1 / (2 * beta))", "(margin / beta + 1 / (2 * beta))", "sign of IPO's target",
           "test_dpo.py::test_ipo_is_least_where_the_log_ratio_gap_is_one_over_two_beta"),
    Mutant("formulas/losses.py", "(margin / beta - 1 / (2 * beta))", "(margin - 1 / (2 * beta))", "β twice in IPO",
           "test_dpo.py::test_ipo_is_least_where_the_log_ratio_gap_is_one_over_two_beta"),
    Mutant("formulas/losses.py", "return (1 - margin).relu()", "return (-margin).relu()", "hinge without its margin",
           "test_dpo.py::test_the_loss_at_margin_0_has_a_known_value"),
    Mutant("forward/rollout.py", "[*ids, end][:max_new_tokens]",
           "[*ids[: max_new_tokens - 1], end]",
           "EOS after a response that was cut", "test_dpo.py::test_eos_ends_a_response_if_it_fits"),
    Mutant("dpo.py", "first = step == 1 and state.from_reference", "first = False", "a wrong start goes unseen",
           "test_dpo.py::test_a_reference_that_is_not_the_start_stops_the_run_only_if_it_should_be"),
    Mutant("dpo.py", "torch.isfinite(norm + loss)", "torch.isfinite(norm)", "an infinite loss goes unseen",
           "test_dpo.py::test_a_loss_that_is_not_finite_leaves_the_weights"),
    Mutant("dpo.py", "min(step / warmup_steps, 1.0)", "min((step - 1) / warmup_steps, 1.0)", "a first step of 0",
           "test_dpo.py::test_warmup_rises_linearly_over_its_share_of_the_steps"),
    Mutant("dpo.py", "shifts = [float((own - ref).mean())", "shifts = [float((ref - own).mean())", "sign of the shifts",
           "test_dpo.py::test_statistics_are_of_before_the_step_and_make_sense"),
    # SFT
    Mutant("sft.py", "[-100] * len(prompt) + response", "prompt + response", "the prompt is a label",
           "test_sft.py::test_the_prompt_is_no_label"),
    Mutant("sft.py", "len(prompt) + response", "len(prompt) + completion + [-100]", "EOS is no label",
           "test_sft.py::test_the_prompt_is_no_label"),
    # the sampler
    Mutant("forward/sampling.py", "token, logprob = _inverse_cdf(scaled, uniform[rows])",
           "kept = scaled.topk(min(50, scaled.shape[1])).indices\n"
           "        scaled = torch.full_like(scaled, -torch.inf).scatter(1, kept, scaled.gather(1, kept))\n"
           "        token, logprob = _inverse_cdf(scaled, uniform[rows])", "top-k in the sampler",
           "test_sampling.py::test_there_is_no_hidden_top_k"),
    Mutant("forward/sampling.py", "scaled = logits.float() / temperature", "scaled = logits.float()",
           "temperature ignored",
           "test_sampling.py::test_temperature_divides_the_logits_of_sampling_and_of_the_log_probs"),
    Mutant("forward/sampling.py",
           "alive = alive & (tokens[-1] != end)", "alive = alive & True", "nothing ends at EOS",
           "test_sampling.py::test_a_response_ends_with_eos_and_only_padding_follows"),
    Mutant("forward/sampling.py", "logprobs.append(torch.where(alive, nothing.scatter(0, rows, logprob), 0.0))",
           "logprobs.append(nothing.scatter(0, rows, logprob))",
           "log-probs in the padding", "test_sampling.py::test_a_response_ends_with_eos_and_only_padding_follows"),
    Mutant("forward/sampling.py",
           "self.positions = self.positions[:, -1:] + 1", "self.positions = self.positions[:, -1:]",
           "every sampled token at one position",
           "test_fast.py::test_greedy_and_sampled_tokens_are_those_of_the_model_s_own_decoding"),
    Mutant("forward/sampling.py", "_inverse_cdf(scaled, uniform[rows])", "_inverse_cdf(scaled, uniform[: len(rows)])",
           "rows that go on take the uniforms of rows that ended",
           "test_sampling.py::test_rows_that_have_ended_are_read_no_longer_and_the_others_do_not_notice"),
    Mutant("formulas/randomness.py", "logits.shape[-1] - 1, 1), right=True", "logits.shape[-1] - 1, 1), right=False",
           "a uniform of 0 draws an impossible token",
           "test_sampling.py::test_a_token_of_probability_0_is_never_drawn_not_even_at_the_edges_of_the_uniform"),
    Mutant("forward/sampling.py", "if not torch.isfinite(logprob).all()", "if False", "NaN is sampled from",
           "test_sampling.py::test_weights_that_are_nan_are_refused"),
    Mutant("forward/reading.py", "logits, read = _read(policy, ids, mask, length)",
           "logits, read = _read(policy, ids, mask, length + 1)\n        logits = logits[:, :length]",
           "logits of the token before",
           "test_fast.py::test_logits_and_gradients_of_ragged_prompts_are_the_model_s_own"),
    Mutant("forward/reading.py", "return logits if temperature == 1.0 else logits / temperature", "return logits",
           "scoring without the temperature",
           "test_sampling.py::test_response_logits_at_a_temperature_are_divided_by_it"),
    Mutant("forward/rollout.py",
           "finished = torch.tensor([bool(row) and row[-1] in ends for row in responses])",
           "finished = torch.tensor([True for row in responses])", "what was cut counts as finished",
           "test_sampling.py::test_prompts_are_padded_on_the_left_and_responses_on_the_right"),
    Mutant("data/encoding.py",
           "split_special_tokens=not chat", "split_special_tokens=False", "special tokens become real",
           "test_sampling.py::test_special_tokens_written_in_a_prompt_stay_text"),
    # read fast
    Mutant("forward/cpu.py", "_agreed[model] = _agrees(model)", "_agreed[model] = True",
           "nobody tries whether the numbers agree",
           "test_fast.py::test_a_model_whose_numbers_differ_is_left_to_the_model_and_asked_once"),
    Mutant("forward/known.py",
           "supported and all(_ordinary(module, device) for module in model.modules())", "supported",
           "an adapter is overlooked", "test_fast.py::test_what_is_more_than_the_plain_model_is_left_to_the_model"),
    Mutant("forward/cpu.py", "mul_(rope.conj())", "mul_(rope)", "gradients of q and k turned the wrong way",
           "test_fast.py::test_logits_and_gradients_of_ragged_prompts_are_the_model_s_own"),
    Mutant("forward/cpu.py", "grad * weight, unit, radial, value=-1", "grad * weight, unit, radial, value=0",
           "a norm's gradient without its radial part",
           "test_fast.py::test_logits_and_gradients_of_ragged_prompts_are_the_model_s_own"),
    Mutant("forward/cpu.py", "self.mask[rows], self.position[rows]", "self.mask[rows], self.position[: len(rows)]",
           "rows that go on take the positions of rows that ended",
           "test_fast.py::test_the_decoder_reads_on_with_the_rows_that_are_left"),
    # what ends a reply, and what can be read
    Mutant("data/ends.py", "ends = (tokenizer.eos_token_id, *listed, template_end(tokenizer))",
           "ends = (tokenizer.eos_token_id,)", "only the tokenizer's EOS ends a reply",
           "test_ends.py::test_the_sampler_stops_at_the_end_of_a_turn"),
    Mutant("data/ends.py", "return tokenizer.eos_token_id if end is None else end", "return tokenizer.eos_token_id",
           "EOS behind a turn of a conversation",
           "test_ends.py::test_the_template_says_what_stands_behind_a_reply"),
    Mutant("data/encoding.py", "return both[len(front):] if both.startswith(front) else alone", "return alone",
           "a reply loses the space that it begins with",
           "test_ends.py::test_a_reply_that_was_decoded_is_encoded_to_the_same_ids"),
    Mutant("models/fitness.py", "if gap > allowed:", "if gap > 100:", "a model that ignores padding is used",
           "test_any_model.py::test_padding_and_cache_are_tried_and_dropout_is_no_fault"),
    Mutant("models/fitness.py", "if getattr(part, name, value) != value:", "if getattr(part, name, value) is None:",
           "switches stay as they were", "test_any_model.py::test_a_mixture_that_was_not_loaded_here_is_sampled_too"),
    Mutant("forward/scoring.py", "or (row in usual[number] and answer != row)", "or False",
           "the reward model reads other words than were written",
           "test_any_model.py::test_ppo_stops_at_its_start_if_the_reward_model_reads_other_tokens"),
    # for a GPU: graphs and passes
    Mutant("forward/cuda_graph.py",
           "_agreed[policy] = agrees", "_agreed[policy] = True", "a decoder that disagrees is used",
           "test_graphs.py::test_a_decoder_that_disagrees_or_fails_is_not_used_and_says_so_once"),
    Mutant("forward/cuda_graph.py", "logprob.masked_fill(ended, 0.0)", "logprob", "log-probs in the padding of a graph",
           "test_graphs.py::test_tokens_are_those_of_the_generic_loop"),
    Mutant("forward/cuda_graph.py",
           "layer.values], 1)[which]", "layer.values], 1)[which.flip(0)]", "another row's prompt is read",
           "test_graphs.py::test_tokens_are_those_of_the_generic_loop"),
    Mutant("forward/sampling.py",
           "generator.set_state(state)", "pass", "a graph takes other random numbers than the loop",
           "test_graphs.py::test_tokens_are_those_of_the_generic_loop"),
    Mutant("forward/reading.py", "if not _linear[policy]", "if False", "a head that is not linear is taken for one",
           "test_parts.py::test_logits_that_are_more_than_a_linear_head_are_read_as_ever"),
    Mutant("ppo.py", "(share * loss).backward()", "loss.backward()", "passes of PPO all weigh the same",
           "test_parts.py::test_a_ppo_step_in_passes_is_the_step_in_one"),
    Mutant("ppo.py", "torch.cat(part)[place]", "torch.cat(part)", "scores of passes in the order of lengths",
           "test_parts.py::test_a_rollout_scored_in_passes_is_scored_the_same_and_in_its_order"),
    Mutant("dpo.py", "for _, part in read])[place]", "for _, part in read])", "passes of DPO in the order of lengths",
           "test_parts.py::test_a_dpo_step_in_passes_is_the_step_in_one"),
    Mutant("forward/precision.py", "functools.partial(checkpoint, layer.forward, use_reentrant=False)", "layer.forward",
           "passes keep every activation",
           "test_parts.py::test_gradient_checkpointing_reads_each_layer_again_and_moves_the_weights_the_same"),
    # models
    Mutant("forward/rollout.py", "(attention_mask.long().cumsum(-1) - 1)",
           "(torch.ones_like(attention_mask).long().cumsum(-1) - 1)", "positions count the padding",
           "test_models.py::test_positions_count_real_tokens"),
    Mutant("models/loading.py", "if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id",
           "if tokenizer.pad_token_id is None", "padding is EOS",
           "test_models.py::test_a_model_whose_padding_is_missing_or_eos_gets_another"),
    Mutant("models/adapters.py", "if _has_adapter(policy) and all(", "if _has_adapter(policy) or all(",
           "the reference of a trained adapter is the base (LLaMA-Factory)",
           "test_models.py::test_a_trained_adapter_s_reference_is_the_policy_of_that_moment_not_the_base"),
    Mutant("models/adapters.py", "return copy.deepcopy(merged(model)).eval()", "return merged(model).eval()",
           "the frozen copy is the model itself",
           "test_models.py::test_a_frozen_copy_shares_nothing_and_cannot_be_trained"),
    Mutant("desk/tiny.py", "policy.lm_head.bias.fill_(NEVER)", "policy.lm_head.bias.fill_(-3.0)",
           "the tiny policy can say other words",
           "test_models.py::test_the_support_is_eleven_sentences_and_eos_and_stays_so"),
    Mutant("models/loading.py", "use_safetensors=True", "use_safetensors=None", "pickles are opened",
           "faults/test_gate.py::test_47_a_hub_id_goes_through_the_cache_and_its_records_through_the_gate"),
    Mutant("models/loading.py", "gate.drop_attention(config)", "pass", "flash attention is fetched",
           "faults/test_gate.py::test_46_flash_attention_in_a_config_is_not_fetched_and_the_model_loads"),
    Mutant("models/gate.py", 'not _plain_name(shard) or not shard.endswith(".safetensors")', "not _plain_name(shard)",
           "an index may name a pickle",
           "faults/test_gate.py::test_45_an_index_that_names_a_pickle_or_a_path_is_refused"),
    Mutant("models/gate.py", "if not any(target.is_relative_to(home) for home in homes):", "if False:",
           "links leave the folder", "faults/test_gate.py::test_47_a_link_that_leaves_the_folder_is_refused"),
    Mutant("models/gate.py", "if not math.isfinite(tensor.sum(dtype=exact)) and", "if False and",
           "NaN is saved", "faults/test_gate.py::test_24_weights_that_are_not_finite_are_not_saved"),
    Mutant("models/gate.py", "constants.HF_HUB_OFFLINE = True", "pass", "a folder may fetch what it names",
           "faults/test_gate.py::test_46_nothing_is_fetched_while_a_folder_is_opened"),
    Mutant("models/loading.py", "if lacking:", "if False:", "a missing head is invented",
           "test_models.py::test_a_policy_is_not_a_reward_model_nor_the_other_way_round"),
    Mutant("models/loading.py", "module.p = 0.0", "pass", "dropout stays on", "test_models.py::test_dropout_is_off"),
    # the reward model
    Mutant("reward.py", "return [[*prompt, *response, end] for", "return [[*prompt, *response] for",
           "responses scored without EOS", "test_reward.py::test_a_score_is_what_hugging_face_s_classifier_says"),
    Mutant("reward.py", "mask.sum(1, keepdim=True) - 1", "mask.sum(1, keepdim=True) - 2",
           "the reward read one token early (pad = EOS)",
           "test_reward.py::test_the_score_is_read_at_eos_even_where_padding_is_eos"),
    Mutant("reward.py", "return (self.raw(prompts, responses) - self.mean) / self.std",
           "return self.raw(prompts, responses) - self.mean", "scores not scaled",
           "test_reward.py::test_normalised_scores_have_mean_0_and_standard_deviation_1"),
    Mutant("evaluate/readings.py", "_, number = np.unique(clusters, return_inverse=True)",
           "number = np.arange(len(clusters))", "values of one question count as independent",
           "test_plots_reward_model.py::test_a_clustered_mean_is_a_bootstrap_of_whole_clusters"),
    Mutant("evaluate/readings.py", "estimates(sums[None], sizes[None].astype(float))",
           "estimates(sums[None] / sizes[None], np.ones((1, len(sizes))))", "a large question counts like a small one",
           "test_plots_reward_model.py::test_a_clustered_mean_is_a_bootstrap_of_whole_clusters"),
    Mutant("evaluate/reward_model.py",
           'abs(row["accuracy"] - row["confidence"])', '(row["confidence"] - row["accuracy"])',
           "calibration errors cancel", "test_reward.py::test_calibration_error_equals_a_slow_sum"),
    Mutant("evaluate/reward_model.py", "float(np.maximum(chance, 1 - chance).mean())", "float(chance.mean())",
           "the ceiling counts lost labels as won", "test_reward.py::test_the_report_equals_slow_numbers"),
    # judging
    Mutant("evaluate/knowledge.py", "(1 - (1 - chances.clip(max=1)) ** k).mean()",
           "1 - (1 - chances.clip(max=1).mean()) ** k", "pass@k of the mean chance instead of the mean over questions",
           "test_knowledge.py::test_pass_at_k_is_one_minus_the_chance_that_all_fail"),
    Mutant("evaluate/knowledge.py", 'np.mean(marks["right"][group]) / np.mean(marks["tried"][group])',
           'np.mean(np.divide(marks["right"][group], marks["tried"][group]))',
           "a question that is hardly tried counts as much as the others",
           "test_knowledge.py::test_rules_worked_by_hand"),
    Mutant("evaluate/demonstrators.py", "+ _GUESSES / len(ANSWERS) for", "+ _GUESSES / 3 * (given != answer) for",
           "a demonstrator's guess is never right",
           "test_demonstrators.py::test_an_expert_on_a_risky_and_an_ambiguous_prompt_by_hand"),
    Mutant("evaluate/demonstrators.py", "float(-(chances * np.log(chances)).sum())", "float(-np.log(chances).mean())",
           "the demonstrators' entropy counts all responses alike",
           "test_demonstrators.py::test_the_entropy_is_what_demonstrations_are_coded_with"),
    Mutant("evaluate/demonstrators.py", "self.chance *= chances[outcome]", "self.chance *= 1 / len(chances)",
           "both outcomes of a comparison are taken for equally likely",
           "test_demonstrators.py::test_every_path_follows_all_outcomes_of_a_program"),
    Mutant("evaluate/refusals.py", '.replace("’", "\'")', "", "a typographic apostrophe hides a refusal",
           "test_refusals.py::test_replies_are_classified_as_read_by_hand"),
    Mutant("evaluate/refusals.py", '"over_refusal": (classes != COMPLIED, safe)',
           '"over_refusal": (classes == REFUSED, safe)', "partial refusals are not counted",
           "test_refusals.py::test_rates_are_what_was_counted_by_hand_with_wilsons_intervals"),
    Mutant("evaluate/refusals.py", '"unsafe" if kind.startswith("contrast_") else "safe"',
           '"safe" if kind.startswith("contrast_") else "unsafe"', "contrast prompts are taken for safe",
           "test_refusals.py::test_without_a_label_the_type_tells_it_as_in_the_released_file"),
    Mutant("evaluate/adviser.py", "if low > 0.5:", "if accuracy > 0.5:", "a reward model at chance is let pass",
           "test_report.py::test_a_reward_model_that_ranks_like_a_coin_is_told_in_red"),
    Mutant("evaluate/adviser.py", "for step in itertools.pairwise(names)", "for step in [(first, last)]",
           "over-refusal is compared with SFT alone", "test_relay.py::test_advice"),
    Mutant("evaluate/suite_records.py", "(each.hash, each.suite, each.file, each.limit) not in again",
           "(each.hash, each.suite, each.limit) not in {key[:2] + key[3:] for key in again}",
           "a second file's figures replace the first's",
           "test_suites.py::test_prompts_of_xstests_kind_are_a_suite_of_a_file"),
    Mutant("evaluate/wins.py", "preferences = (preferences + 1 - turned) / 2",
           "preferences = (preferences + turned) / 2", "the second order counts for the wrong side",
           "test_wins.py::test_a_liking_for_the_second_place_cancels_when_both_orders_are_asked"),
    Mutant("evaluate/wins.py", "level[:, 1] = 0", "level[:, 0] = 1", "the length stays in the length-controlled rate",
           "test_wins.py::test_without_noise_the_controlled_rate_is_the_truth_and_the_raw_one_is_not"),
    Mutant("evaluate/wins.py", "gradient = ((chances - labels) * weights) @ design",
           "gradient = (chances - labels) @ design", "resamples are fitted without their weights",
           "test_wins.py::test_a_resample_counts_a_row_as_often_as_its_weight"),
    Mutant("evaluate/wins.py", "np.where(of_b == of_a, 0.5, of_b > of_a)", "np.where(of_b == of_a, 0.0, of_b > of_a)",
           "a tie counts for a", "test_wins.py::test_a_reward_model_is_a_judge_and_equal_scores_are_ties"),
    Mutant("evaluate/rewardbench.py", '"math-prm": 984', '"math-prm": 447', "math weighs less than code",
           "test_rewardbench.py::test_sections_are_means_with_the_published_weights_and_overall_is_the_mean_of_sections"),
    Mutant("evaluate/rewardbench.py", "weight / sum(weights.values()) / count", "weight",
           "large sections weigh more in the overall figure",
           "test_rewardbench.py::test_sections_are_means_with_the_published_weights_and_overall_is_the_mean_of_sections"),
    Mutant("evaluate/rewardbench.py", "zip(rows, (chosen > rejected).tolist(), strict=True)",
           "zip(rows, (chosen >= rejected).tolist(), strict=True)", "ties count as right",
           "test_rewardbench.py::test_ties_count_as_wrong_and_are_counted"),
    Mutant("evaluate/reward_table.py", "exact.best_of_n(logps, table, n)", "exact.best_of_n(logps, truth, n)",
           "the best of n is chosen by gold itself",
           "test_rewardbench.py::test_best_of_n_by_gold_itself_is_the_mean_of_the_largest_of_n"),
    # the world
    Mutant("desk/world.py", "(1 - 2 * annotator.flips) * clean + annotator.flips", "(1 - 2 * annotator.flips) * clean",
           "flipped labels lean one way",
           "test_world.py::test_preference_is_a_probability_whose_two_sides_add_up_to_1"),
    Mutant("desk/world.py",
           "_sigmoid(annotator.sharpness * sum(deltas))", "_sigmoid(-annotator.sharpness * sum(deltas))",
           "the annotator prefers the worse",
           "test_world.py::test_the_default_annotator_is_bradley_terry_on_gold_and_two_biases"),
    Mutant("desk/world.py", "wins = draws[i] < chance", "wins = draws[i] > chance", "chosen and rejected swapped",
           "test_world.py::test_preference_pairs_follow_the_probability_and_the_noise_dial"),
    Mutant("desk/world.py", "helpful = (2.0 * right - 0.8 * wrong", "helpful = (2.0 * right + 0.8 * wrong",
           "gold likes wrong answers", "test_world.py::test_gold_equals_the_slow_table_for_every_short_response"),
    Mutant("desk/world.py", '- 3.0 * has["UNSAFE"]', '+ 3.0 * has["UNSAFE"]', "gold likes what is unsafe",
           "test_world.py::test_gold_scores_takes_texts_and_refuses_what_it_does_not_know"),
    Mutant("desk/world.py", "answers[thing], key in held_out,", "answers[thing], key in held_out and template > 0,",
           "a held-out question is trained on in other words",
           "test_world.py::test_train_and_held_out_prompts_share_neither_text_nor_key"),
    # the exact truth
    Mutant("exact/causes.py", "near = gold[kl <= FAR]", "near = gold", "a peak beyond FAR counts as a fall before it",
           "test_causes.py::test_a_curve_that_still_rises_has_not_fallen"),
    Mutant("exact/causes.py", '"noise": (both - bias + noise - neither) / 2',
           '"noise": (both - noise + bias - neither) / 2', "the effect of bias is told as that of noise",
           "test_causes.py::test_effects_worked_by_hand"),
    Mutant("exact/causes.py", "(both - noise) - (bias - neither)", "(both - noise) + (bias - neither)",
           "the interaction is a sum", "test_causes.py::test_effects_worked_by_hand"),
    Mutant("exact/truth.py", "ref_logps + rewards / beta", "ref_logps - rewards / beta", "sign of the optimum",
           "test_exact.py::test_the_optimum_is_better_than_its_neighbours"),
    Mutant("exact/truth.py", "(ordered.diff(dim=1) > _rounding(rewards))", "(ordered.diff(dim=1) >= 0)",
           "best-of-n breaks ties by their order", "test_exact.py::test_best_of_n_in_closed_form_with_ties"),
    Mutant("exact/truth.py",
           "return math.log(n) - (n - 1) / n", "return math.log(n) - 1", "the bound on best-of-n's KL",
           "test_exact.py::test_best_of_n_sums_to_one_and_its_kl_is_bounded"),
    # evaluation, checkpoints, report
    Mutant("evaluate/evaluation.py", "np.unique(self.set.keys, return_index=True, return_inverse=True)",
           "np.unique(np.arange(len(self.set.keys)), return_index=True, return_inverse=True)",
           "the bootstrap draws prompts instead of keys",
           "test_evaluate.py::test_an_evaluation_draws_keys_within_their_kind"),
    Mutant("evaluate/suite_records.py", "value + _Z * stderr", "value + stderr", "one standard error instead of 1.96",
           "test_suites.py::test_the_interval_is_196_standard_errors_wide_and_absent_without_one"),
    Mutant("evaluate/suites.py", "math.fsum(error**2 for error in errors)) / len(errors)",
           "math.fsum(error**2 for error in errors) / len(errors))", "a mean's standard error divided inside the root",
           "test_suites.py::test_groups_and_their_average_are_the_unweighted_means"),
    Mutant("evaluate/suites.py", "if names and all(name in main for name in names)",
           "if names and any(name in main for name in names)", "a group that lacks a suite gets a figure",
           "test_suites.py::test_groups_and_their_average_are_the_unweighted_means"),
    Mutant("formulas/intervals.py", "draws = self._ratios(*second) - self._ratios(*first)",
           "draws = self._ratios(*second) - self._ratios(*first)[:, ::-1]", "differences that are not paired",
           "test_evaluate.py::test_paired_differences_cover_and_are_narrower_than_unpaired"),
    Mutant("runs/frozen.py", 'if file_hash(path) != expected["sha256"]', "if False", "the hashes are not compared",
           "test_relay.py::test_one_flipped_bit_in_any_file_is_seen_and_named"),
    Mutant("runs/frozen.py", "and Manifest(files).to_bytes() == written)", ")",
           "a manifest may be rewritten", "test_relay.py::test_one_flipped_bit_in_any_file_is_seen_and_named"),
    Mutant("runs/frozen.py", "_open(new, source)", "pass", "what is frozen was not opened",
           "faults/test_gate.py::test_24_weights_that_are_not_finite_are_not_loaded_frozen_or_compared"),
    Mutant("runs/frozen.py", 'problems[name] = "was added after freezing"', "pass", "files may be added after freezing",
           "test_relay.py::test_truncation_deletion_and_additions_are_seen_and_named"),
    Mutant("pages/render.py", "return value if isinstance(value, Markup) else escape(visible(value, limit))",
           "return Markup(visible(value, limit))",
           "model text is HTML in the report", "test_report.py::test_hostile_text_is_only_ever_text"),
    # the graded lab
    Mutant("teaching/grading.py", "if problem and number == 0:", "if False:",
           "a function that always returns 0 gets the points of the later checks of its task",
           "test_teaching.py::test_the_checks_of_a_task_give_full_points_to_the_answer_key_and_fewer_to_each_wrong_answer"),
    Mutant("teaching/grading.py", "csv_cell(value) for value in row", "value for value in row",
           "a student's text is a formula of the spreadsheet",
           "test_teaching.py::test_the_table_has_no_formulas_no_line_breaks_and_no_endless_texts"),
    Mutant("teaching/tasks.py", "if isinstance(answer, bool) or not isinstance(answer, (int, float)):", "if False:",
           "text is a number",
           "test_teaching.py::test_an_answer_is_compared_by_value_and_shape_and_nan_is_never_right"),
    Mutant("teaching/tasks.py", "float(answer) if abs(answer) < 1e300 else math.nan", "float(answer)",
           "a number with hundreds of digits stops the grading",
           "test_teaching.py::test_an_answer_is_compared_by_value_and_shape_and_nan_is_never_right"),
    Mutant("teaching/tasks.py", "manual_seed(seed)", "manual_seed(0)",
           "the hidden inputs are the same in every grading",
           "test_teaching.py::test_hidden_inputs_differ_between_gradings_and_not_between_files"),
    Mutant("teaching/probe.py", "if left[0] < 0:", "if False:", "a kernel sends a tensor of any size",
           "test_teaching.py::test_the_probe_bounds_what_it_sends"),
    Mutant("teaching/submission.py", 'if cell.get("cell_type") == "code" and isinstance(tags, list) and tag in tags:',
           "if tag in (tags or []):", "a damaged cell stops the grading",
           "test_teaching.py::test_a_file_that_is_no_lab_is_refused_with_a_reason"),
    Mutant("teaching/student.py", "if not overwrite:", "if False:", "a student's work is overwritten",
           "test_teaching.py::test_a_student_s_work_is_kept_and_a_second_call_changes_nothing"),
    Mutant("teaching/student.py", 'if "solution" not in cell["metadata"].get("tags", [])', "",
           "student versions show the solutions",
           "test_teaching.py::test_a_student_version_has_no_solution_and_keeps_stubs_and_checks"),
    # several processes
    Mutant("processes.py", "dist.all_reduce(flat)", "pass", "each process steps along its own gradient",
           "test_processes.py::test_several_processes_compute_the_numbers_of_one[2-dpo]"),
    Mutant("processes.py", "(slice(0, 1), 0.0)", "(slice(0, 1), 1.0)", "a row that two processes read counts twice",
           "test_processes.py::test_several_processes_compute_the_numbers_of_one[3-ppo few]"),
    Mutant("ppo.py", "[], self[own], self.rollout.response_mask.sum()",
           "[], self[own], self[own].rollout.response_mask.sum()",
           "a process weights its parts by its own tokens",
           "test_processes.py::test_several_processes_compute_the_numbers_of_one[2-ppo]"),
    Mutant("ppo.py", "passes(demonstrations[own], config.tokens_per_pass",
           "passes(demonstrations, config.tokens_per_pass",
           "every process reads all demonstrations",
           "test_processes.py::test_several_processes_compute_the_numbers_of_one[2-ppo ptx]"),
    Mutant("dpo.py", "weight * len(part) / len(pairs)", "weight * len(part) / len(pairs[own])",
           "a process weights its parts by its own pairs",
           "test_processes.py::test_several_processes_compute_the_numbers_of_one[2-dpo]"),
    Mutant("forward/sampling.py", "dtype=torch.float64)[own].to(device)",
           "dtype=torch.float64)[:len(prompt_ids)].to(device)",
           "every process samples with the numbers of the first rows",
           "test_processes.py::test_several_processes_compute_the_numbers_of_one[2-ppo]"),
    Mutant("followers.py", "send = self._sum() != self.sum", "send = self.sum is None",
           "a run that was rewound goes on from other weights in the other processes",
           "test_processes.py::test_a_kernel_leads_processes_that_follow_it_and_end_with_it"),
    Mutant("shards.py", "weight.grad = None  # the optimiser passes over it", "pass",
           "with states in parts every process keeps the states of all weights",
           "test_processes.py::test_sharded_optimiser_states_change_no_bit_and_take_a_share_of_the_memory"),
    Mutant("shards.py", "for keeper in range(count()):", "for keeper in ():",
           "with states in parts no process gets the weights that others have stepped",
           "test_processes.py::test_sharded_optimiser_states_change_no_bit_and_take_a_share_of_the_memory"),
]


def places(source: str, old: str) -> list[re.Match]:
    """Where `old` is in `source`, however it is wrapped."""
    tokens = re.findall(r"\w+|[^\w\s]", old)
    pattern = re.escape(tokens[0])
    for before, token in itertools.pairwise(tokens):
        pattern += (r"\s+" if re.fullmatch(r"\w\w", before[-1] + token[0]) else r"\s*") + re.escape(token)
    return list(re.finditer(pattern, source))


def copy_package(folder: str) -> Path:
    """A copy of what the tests need."""
    ignore = shutil.ignore_patterns("__pycache__", "browser")
    for name in ("alignkit", "tests", "notebooks"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=ignore)
    shutil.copy2(ROOT / "pyproject.toml", folder)
    return Path(folder)


def run_tests(folder: Path, tests: list[str]) -> tuple[int | None, str]:
    """pytest's exit status, None if it took too long, and what it said; in a process of its own."""
    process = PROCESSES.Process(target=_pytest, args=(str(folder), tests))
    try:
        process.start()
    except EOFError:
        return None, "somebody killed the process that forks"
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
        return None, f"no end after {TIMEOUT} s"
    return process.exitcode, (folder / "said").read_text(errors="replace")


def _pytest(folder: str, tests: list[str]) -> None:
    os.chdir(folder)
    said = os.open("said", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = folder
    import pytest

    status = pytest.main(["-xq", "--no-header", "-p", "no:cacheprovider", "--tb=line", "--basetemp", "tmp", *tests])
    import alignkit

    if not alignkit.__file__.startswith(os.path.realpath(folder)):
        print(f"the tests ran on {alignkit.__file__}")
        status = 99
    sys.exit(int(status))


def attempt(mutant: Mutant) -> tuple[str, str]:
    """What became of a mutant, "killed", "SURVIVED" or "BROKEN", and why if it is not killed."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        folder = copy_package(temporary)
        path = folder / "alignkit" / mutant.file
        source = path.read_text(encoding="utf-8")
        found = places(source, mutant.old)
        if len(found) != 1:
            return "BROKEN", f"{mutant.old!r} is in alignkit/{mutant.file} {len(found)} times, expected once"
        path.write_text(source[: found[0].start()] + mutant.new + source[found[0].end() :], encoding="utf-8")
        status, said = run_tests(folder, [f"tests/{mutant.test}"])
    if status in (0, 1):
        return ("SURVIVED", mutant.test) if status == 0 else ("killed", "")
    return "BROKEN", f"{mutant.test} did not run (status {status}): {said.strip()[-300:]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants whose file or reason contains one of these")
    parser.add_argument("-j", "--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="mutants at a time")
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS
              if not options.words or any(word in f"{mutant.file} {mutant.reason}" for word in options.words)]
    if not chosen:
        print(f"no mutant's file or reason contains {' or '.join(options.words)}")
        return 1
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", OMP_NUM_THREADS="1",
                      TOKENIZERS_PARALLELISM="false")  # before the first import; conftest.py comes too late here
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as temporary:
        tests = sorted({f"tests/{mutant.test}" for mutant in chosen})
        status, said = run_tests(copy_package(temporary), tests)
    if status != 0:
        print(f"the tests do not pass on the package as it is:\n{said[-2000:]}")
        return 1
    print(f"{len(tests)} tests pass on the package as it is ({time.monotonic() - begun:.0f} s)")
    bad = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, (result, why) in zip(chosen, pool.map(attempt, chosen), strict=True):
            bad += result != "killed"
            print(f"{result:<9} {mutant.file:<13} {mutant.reason}{': ' * bool(why)}{why}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} killed in {time.monotonic() - begun:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
