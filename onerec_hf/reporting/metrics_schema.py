"""What a run's metrics.json holds: every key, its meaning and its unit.

`METRICS` has the file's nesting. A name in angle brackets stands for many: `<k>` for a length of a ranked list,
`<objective>` for the reward model's objectives and for `reward`, the scalar that it makes of them, `<judge>` for
`reward_model` (which trains), `independent_judge` and `truth` (a simulated world's own), `<baseline>` for a method
beside OneRec. A list's one entry describes all.

A figure `x` that is a mean over users may have `x_interval` beside it: the ends [low, high] of its 95% bootstrap
interval over users, in its unit. Figures without a unit are shares or scores as said; a part or a figure that a run
did not have, or that is undefined in it, is missing.
"""

from typing import Any

RANKING = {
    "recall@<k>": "Share of users whose next positive item is among the first k ranked items of the full catalogue.",
    "ndcg@<k>": "Mean over users of 1 / log2(1 + rank) of the next item; 0 beyond k.",
    "coverage": "Share of the catalogue in the top 10 of at least one user; depends on the number of users.",
}
USERS_PER_SECOND = {"users_per_second": "Users ranked for in a second, all of the catalogue for each."}
BASELINE = {
    **RANKING,
    **USERS_PER_SECOND,
    "fit_seconds": "Time of fitting it, and of the members of a fused one [s].",
    "num_parameters": "Numbers that were fitted; of nearest neighbours the similarities that are kept.",
}
POLICY = {
    **RANKING,
    **USERS_PER_SECOND,
    "duplicate_rate": "Share of generated sessions that hold an item twice.",
    "illegal_rate": "Share of generated items whose codes are no item's.",
    "intra_session_diversity": "Mean cosine distance of the items of a session, from 0 (the same) to 2 (opposite).",
    "session_coverage": "Share of the catalogue in at least one generated session.",
    "popular_item_share": "Of a user's generated items, the share among the most consumed 1% of the catalogue.",
    "kl_to_seed": "Divergence of a user's session distribution from the seed model's [nats a session].",
}
CHANGE = {
    "relative": "Change to round 0 on the same users, as a share of round 0's value.",
    "interval": "Ends of its paired 95% bootstrap interval.",
}
JUDGED = {
    "<objective>_mean": "Mean over a user's generated sessions of what the judge expects, averaged over users.",
    "<objective>_max": "The largest of a user's sessions, averaged over users.",
}
ESTIMATES = {
    "logged": "Mean label of the logged exposures.",
    "snips": "Self-normalised inverse propensity estimate of the mean label under the policy.",
    "doubly_robust": "Doubly robust estimate, with the independent judge as the model of feedback.",
    **dict.fromkeys(("snips_difference", "doubly_robust_difference"), "Difference to round 0's, paired by user."),
}
ROUND = {
    "round": "Number of the round; 0 is the seed model.",
    "kept": "Whether the align stage kept the round; the run ends in the last one that it kept.",
    **POLICY,
    "judges": {"<judge>": JUDGED},
    "change": {
        **dict.fromkeys(("recall@<k>", "ndcg@<k>", "coverage", "popular_item_share"), CHANGE),
        "judges": {"<judge>": dict.fromkeys(JUDGED, CHANGE)},
    },
    "on_log": {
        "exposures": "Logged exposures that are reweighted.",
        "known_propensities": "Whether these were drawn by known chances; otherwise propensities are estimated.",
        "effective_sample_size": "(sum w)^2 / sum w^2 of their weights w: as how many exposures they count.",
        "mean_weight": "Mean of w; 1 under true propensities.",
        "clipped_share": "Share of the weights that were cut.",
        "conclusive": "Whether the effective sample reaches 100 and the mean weight lies in [0.5, 2].",
        "heads": {"<objective>": ESTIMATES},
    },
}
REWARD_FIGURES = {
    "<objective>_auc": "Chance that a label above the median has a higher estimate than one that is not.",
    "<objective>_gauc": "The same among one user's, averaged over users by size.",
    "<objective>_log_loss": "Cross-entropy of the estimate [nats].",
    "<objective>_base_log_loss": "Cross-entropy of always answering the mean label [nats].",
    "<objective>_calibration_error": "Mean gap between estimate and label over ten bins of equal size.",
    "<objective>_label_mean": "Mean label, in [0, 1].",
    "<objective>_estimate_mean": "Mean estimate, in [0, 1].",
    "<objective>_labels": "Number of known labels.",
}
SAMPLED = (
    "Of a log in partitions, what embeddings, reward models, baselines, alignment and evaluation were given where it "
    "was not all (sampled_interactions)."
)
SERVED = {
    "method": "onerec; cascade, of a retriever and the reward model; a baseline, whose first items are served; or "
    "oracle, which builds sessions by the simulated truth.",
    "retriever": "What finds candidates: a ranking of items; of OneRec beam, diverse_beam or its own ranked_list.",
    "candidates": "Items, or of OneRec sessions, that the reward model sees, beams where it guides; null without it.",
    "ranker": "item: those of highest reward alone; session: built greedily by reward; best_session: of whole ones.",
    "guided": "Whether the reward model takes part in OneRec's search.",
    "guidance_weight": "What a reward of 1 is worth there [nats an item]; null where it takes no part.",
    "round": "Round of alignment that OneRec's model is of; null for other methods.",
    "recall": "Of the user's next positive items, as many as a session has, the share that the session holds.",
    "coverage": "Share of the catalogue in at least one served session.",
    "diversity": "Mean cosine distance of the items of a session.",
    "popular_item_share": POLICY["popular_item_share"],
    "milliseconds": "Time for a user, of a cascade both parts'; null for the oracle.",
    "judges": {"<judge>": {"reward": "Mean reward of the session.", "interval": "Its 95% bootstrap interval."}},
    "oracle_share": "How much of the way from the first popular items to the oracle it is, by the truth.",
    "replay": {
        "items": "Served items that the log showed to the same user in the evaluated period; replay is null where it "
        "has no exposures.",
        "share": "Their share of the served items.",
        "feedback": {
            "<objective>": {"mean": "Mean label of them by user.", "interval": "Its 95% bootstrap interval."}
        },
    },
}
TRAINED_ON = "Runs of exposures that it was trained on; the other figures are those on later sessions or exposures."
BEFORE_POLICY = "The same before the collision policy."
ERROR = "Squared error of the embeddings' reconstruction, as a share of their variance."
QUANTIZER_FIELDS = (
    *("codebook_sizes", "collision_policy", "suffix_size", "seed", "assignment", "code_assignment", "max_iterations"),
    "fitted_items",
    *("latent_dim", "hidden_sizes", "num_steps", "batch_size", "learning_rate", "commitment"),
)
METRICS: dict[str, Any] = {
    "dataset": {
        "name": "The data set's.",
        "hub_dataset": "Its Hub repository, or none.",
        "num_users": "Users with any interaction.",
        "num_items": "Items of the catalogue.",
        "num_interactions": "All of them, before and in the evaluated period.",
        "num_fitted_positives": "Positive behaviours among the fitted interactions.",
        "num_pretraining_sessions": "Target sessions cut from these.",
        "num_evaluation_users": "Users with a next positive item in the evaluated period.",
        "positive_feedback": "Conditions, any of which makes a behaviour positive; none: all are.",
        "split": {
            "method": "time or leave_one_out.",
            "evaluation_split": "The evaluated period: validation or test.",
            "fitted_until": "The period before which everything is fitted: the evaluated one, or validation.",
            "evaluation_start": "Its beginning (ISO time).",
            "evaluation_end": "Its end (ISO time), none for the log's end.",
            "latest_fitted": "Time of the latest fitted interaction.",
            "data_start": "Time of the first interaction.",
            "data_end": "Time of the last interaction.",
            "leaks_future": "True where users' fitted behaviour may be later than others' evaluated one.",
            "fit_interactions": "Fitted interactions.",
            "fit_users": "Users among them.",
            "evaluation_interactions": "Interactions in the evaluated period.",
            "evaluation_users": "Users among them.",
        },
        "evaluation_split": "As in the split.",
        **dict.fromkeys(("num_sampled_interactions", "num_sampled_users"), SAMPLED),
        "num_evaluated_users": "Users that are ranked for, at most evaluation_users.",
        "num_judged_users": "Users among them whose generated sessions are judged.",
        "exclude_consumed": "Whether items of a user's history are left out, for every method alike.",
    },
    "tokenizer": {
        "quantizer_type": "The quantizer's name.",
        **dict.fromkeys(QUANTIZER_FIELDS, "Field of the quantizer's class."),
        "num_items": "Items with a semantic ID.",
        "levels": [
            {
                "codes": "Codes of the level.",
                "used": "Codes that an item has.",
                "use": "Their share.",
                "entropy_bits": "Entropy of the codes' frequencies [bits].",
                "perplexity": "2 to the power of the entropy: as many evenly used codes.",
                "min_size": "Fewest items of a code.",
                "max_size": "Most items of a code.",
                "balance": "Mean items of a code over the most: 1 is even.",
                "reconstruction_error": f"After this level: {ERROR}",
            }
        ],
        "reconstruction_error": ERROR,
        "neighbours_kept": "Share of an item's ten nearest neighbours that have its first code.",
        "collision_rate": "Share of the items that share their semantic ID.",
        "max_items_per_id": "Most items of one semantic ID.",
        **dict.fromkeys(("collision_rate_before_policy", "max_items_per_id_before_policy"), BEFORE_POLICY),
        "num_semantic_ids": "Semantic IDs of every item, where there are several; the other figures but for levels, "
        "which has those of all, are the first one's.",
        "sources": "How what their quantizers see differs.",
        "shared_pairs": "Pairs of items with one first code in both of two IDs, as a share of those in either.",
        "moved_items": "Items whose codes the collision policy changed.",
    },
    "model": {
        "num_parameters": "Parameters of the model that the run ends in.",
        "num_pretraining_sessions": "Sessions that it was pre-trained on.",
        "config": {
            "user_features": {"<column>": "Known values of a column of the users' profiles."},
            "<field>": "Field of its OneRecConfig.",
        },
    },
    "onerec": POLICY,
    "baselines": {"<baseline>": BASELINE},
    "skipped_baselines": {"<baseline>": "Why it could not be fitted."},
    "served": [SERVED],
    "alignment": [ROUND],
    "reward_models": {"<judge>": {**REWARD_FIGURES, "num_runs": TRAINED_ON, "exposures": REWARD_FIGURES}},
    "timings": {"<stage>": "Time that the stage took [s]."},
    "environment": {"<package>": "Version of a package or of Python; machine, threads and gpus are the machine's."},
}
