"""Fitting the item gate, g of each user in P(item) = g P_item + (1 - g) P_codes, on sessions held out of training."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..evaluation_mode import evaluation_mode
from ..item_trie import ItemTrie
from .likelihood import session_log_probs

MAX_STEPS = 200
CONSTRAINTS = ("excluded", "allowed")


def fit_item_gate(
    model, trie: ItemTrie, batches: Iterable[tuple[Mapping[str, torch.Tensor], torch.LongTensor]]
) -> dict[str, float]:
    """Fits the gate to the items that followed, by the likelihood of the mixture; everything else stays as it is.

    On data that the model was trained on, the gate would learn which part has fitted more closely. The weights have a
    normal prior under which the logit of g differs by about 1 from user to user, so that few users suffice.

    Args:
        model: An [`OneRecForConditionalGeneration`] with `item_gate`, whose training mode is left as it was.
        trie: The catalogue, on the model's device.
        batches: Inputs of [`session_log_probs`], and the item that followed each history (batch,), a catalogue index.

    Returns:
        `num_users`; `item_share`, the mean of g; and the mean negative log-likelihood of an item [nats] by the item
        head, the codes, and the mixture: `nll_items`, `nll_codes`, `nll_mixture`.

    Raises:
        ValueError: No item is left to fit to.
    """
    states, log_probs = [], []
    with evaluation_mode(model):
        for inputs, following in batches:
            encoder_inputs = {name: value for name, value in inputs.items() if name not in CONSTRAINTS}
            shared = {name: value for name, value in inputs.items() if name in (*CONSTRAINTS, "attention_mask")}
            shared["encoder_outputs"] = encoded = model.get_encoder()(**encoder_inputs)
            mask = model.get_encoder().position_mask(inputs.get("attention_mask"))
            states.append(model.latest_item_states(encoded.item_states, mask)[:, 0].double())
            by_part = [
                session_log_probs(model, trie, following[:, None, None], **shared, item_share=share)
                for share in (1.0, 0.0)
            ]
            log_probs.append(torch.cat(by_part, 1).double())
    if not states:
        raise ValueError("There is no held-out user to fit the item gate to: raise holdout_sessions.")
    # An item that may not be given, such as a repeated one, says nothing of g.
    given = torch.cat(log_probs).isfinite().any(1)
    states, log_probs = torch.cat(states)[given], torch.cat(log_probs)[given]
    if not len(states):
        raise ValueError("All held-out users go on to an item that they may not be given: none says anything of g.")

    gate = nn.Linear(states.shape[1], 1, device=states.device, dtype=torch.double)
    nn.init.zeros_(gate.weight), nn.init.zeros_(gate.bias)
    optimizer = torch.optim.LBFGS(gate.parameters(), max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

    def negative_log_likelihood() -> torch.Tensor:
        logit = gate(states)
        of_both = log_probs + torch.cat([logit, -logit], 1).sigmoid().log()
        return -of_both.logsumexp(1).mean()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        prior = states.shape[1] * gate.weight.square().sum() / (2 * len(states))
        loss = negative_log_likelihood() + prior
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        model.item_gate.weight.copy_(gate.weight)
        model.item_gate.bias.copy_(gate.bias)
        nll_items, nll_codes = (-log_probs.mean(0)).tolist()
        return {
            "num_users": len(states),
            "item_share": gate(states).sigmoid().mean().item(),
            "nll_items": nll_items,
            "nll_codes": nll_codes,
            "nll_mixture": negative_log_likelihood().item(),
        }
