import copy

import numpy as np
import pytest
import torch
from alignment_cases import NUM_ITEMS, preference_pairs, tiny_generator, tiny_tokenizer, training_rows

from onerec_hf.evaluation import popular_items
from onerec_hf.evaluation.alignment_checks import AlignmentChecks, session_recall
from onerec_hf.item_trie import ItemTrie
from onerec_hf.session_likelihood import sampled_divergence, session_log_probs


@pytest.fixture(scope="module")
def policies():
    policy = tiny_generator().eval()
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.lm_head.weight.add_(0.3 * torch.randn(other.lm_head.weight.shape, generator=torch.manual_seed(1)))
    return policy, other


def make_checks(rows, **options) -> AlignmentChecks:
    tokenizer = tiny_tokenizer()
    popular = popular_items(np.array([3, 3, 7, 7, 7, 1]), NUM_ITEMS, share=0.1)
    embeddings = torch.randn(NUM_ITEMS, 4, generator=torch.manual_seed(2))
    return AlignmentChecks(rows, popular, tokenizer, ItemTrie.from_tokenizer(tokenizer), embeddings, **options)


def distribution(model, checks, row, sessions, **options) -> torch.Tensor:
    """Log-probabilities of given sessions [C, m], the history's items left out."""
    inputs = checks._inputs(model, [row])
    return session_log_probs(model, checks.trie, torch.tensor(sessions)[None], **inputs, **options)[0]


def test_figures_are_those_of_all_sessions_enumerated(policies):
    policy, other = policies
    rows = training_rows(40)
    checks = make_checks(rows)
    figures = checks.measure(policy.train(), {"itself": policy, "other": other})
    assert policy.training
    policy.eval()

    directions = torch.nn.functional.normalize(checks.item_embeddings)
    cosines = directions @ directions.T
    recalls, divergences, popular, diversity = [], [], [], []
    pairs = [[first, second] for first in range(NUM_ITEMS) for second in range(NUM_ITEMS) if first != second]
    for row in rows:
        singles = distribution(policy, checks, row, [[item] for item in range(NUM_ITEMS)], normalization="level")
        best = singles.topk(10).indices.tolist()
        recalls.append(len(set(best) & set(row["session"])) / 2)
        log_probs, others = (distribution(model, checks, row, pairs) for model in (policy, other))
        assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-4)
        chance = log_probs.exp()
        divergences.append((chance * (log_probs - others).nan_to_num(0)).sum().item())
        is_popular = torch.tensor(checks.popular)[torch.tensor(pairs)].double().mean(1)
        popular.append((chance * is_popular).sum().item())
        diversity.append((chance * (1 - cosines[tuple(torch.tensor(pairs).T)])).sum().item())
    assert session_recall(figures) == pytest.approx(np.mean(recalls)) and session_recall(figures) > 0
    assert "recall@10" not in figures  # which is the evaluation's, of the next item
    assert figures["illegal_rate"] == 0
    # 640 sessions were drawn.
    assert figures["kl_to_itself"] == pytest.approx(0, abs=1e-6)
    assert np.mean(divergences) > 0.05 and figures["kl_to_other"] == pytest.approx(np.mean(divergences), rel=0.15)
    assert figures["popular_share"] == pytest.approx(np.mean(popular), abs=0.03)
    assert figures["diversity"] == pytest.approx(np.mean(diversity), abs=0.05)


def test_nothing_is_measured_without_held_out_sessions(policies):
    assert make_checks(training_rows().select([])).measure(policies[0], {}) == {}


def test_undefined_figures_are_missing():
    """Sessions of one item have no diversity within them."""
    figures = make_checks(training_rows(4)).measure(tiny_generator(session_items=1), {})
    assert set(figures) == {"session_recall@10", "illegal_rate", "popular_share"}


def test_checks_of_runs_that_called_it_recall_are_read():
    assert session_recall({"recall@10": 0.25}) == 0.25 == session_recall({"session_recall@10": 0.25, "recall@10": 1.0})
    with pytest.warns(FutureWarning, match="exclude_consumed"):
        assert make_checks(training_rows(1), exclude_history=False).exclude_consumed is False


def test_log_probs_of_pairs_are_sums_over_the_whole_vocabulary(policies):
    policy, _ = policies
    pairs = preference_pairs(3).to_list()
    found = make_checks(training_rows()).pair_log_probs(policy, pairs)
    tokenizer = tiny_tokenizer()
    for row, pair in enumerate(pairs):
        for place, session in enumerate((pair["chosen"], pair["rejected"][0])):
            labels = tokenizer.encode_sessions([session], catalogue_indices=True)
            history = tokenizer.encode_histories([pair["history"]], max_items=6, catalogue_indices=True)
            logits = policy(**history, labels=labels).logits.log_softmax(-1)
            expected = logits.gather(-1, labels[..., None]).squeeze(-1)[labels != 2].sum().item()
            assert found[row, place] == pytest.approx(expected, abs=1e-4)


def test_divergence_is_estimated_without_what_was_not_drawn():
    policy = torch.tensor([[-1.0, -2.0, -torch.inf], [-torch.inf] * 3])
    reference = torch.tensor([[-1.5, -1.0, -3.0], [-1.0] * 3])
    found = sampled_divergence(policy, reference)
    assert found[0].item() == pytest.approx((0.5 + np.exp(-0.5) - 1 - 1 + np.e - 1) / 2) and found[1].isnan()
