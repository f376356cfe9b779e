"""Three ways to give the learner's model rows of unequal length, side by side, as JSON: seconds forward and backward.

    python benchmarks/attention.py                                     # the tiny policy, on a GPU where there is one
    python benchmarks/attention.py --rows 128 --shortest 200 --longest 499 --model FOLDER

`padded`: to the longest, with PyTorch's attention and a mask. `masked`: end to end with a mask over all tokens, as
Transformers' `sdpa` does it. `rows`: end to end, each row's attention by itself, as the learner does it. The loss is
the mean log-probability of the next token; all three must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import agent_lightning.learners.attention  # noqa: F401

TINY = Path(__file__).parents[1] / "examples" / "calc_x" / "tiny_policy"


def padded(model: torch.nn.Module, rows: list[Tensor]) -> Tensor:
    tokens = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    logits = model(tokens, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
    return _loss(logits[mask[:, 1:]], tokens[:, 1:][mask[:, 1:]])


def end_to_end(model: torch.nn.Module, rows: list[Tensor]) -> Tensor:
    tokens, places = torch.cat(rows), torch.cat([torch.arange(len(row), device=row.device) for row in rows])
    logits = model(tokens[None], position_ids=places[None], use_cache=False).logits[0]
    follows = places[1:] > 0
    return _loss(logits[:-1][follows], tokens[1:][follows])


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), tokens)


WAYS: dict[str, tuple[str, Callable[[torch.nn.Module, list[Tensor]], Tensor]]] = {
    "padded": ("sdpa", padded),
    "masked": ("sdpa", end_to_end),
    "rows": ("rows_sdpa", end_to_end),
}


def once(model: torch.nn.Module, rows: list[Tensor], way: Callable[..., Tensor]) -> tuple[float, float]:
    """Seconds of a pass forward and backward, and the loss."""
    started = time.perf_counter()
    loss = way(model, rows)
    loss.backward()
    value = loss.item()
    if rows[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--shortest", type=int, default=40)
    parser.add_argument("--longest", type=int, default=139)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device)
    torch.manual_seed(0)
    lengths = torch.randint(options.shortest, options.longest + 1, (options.rows,)).tolist()
    rows = [torch.randint(model.config.vocab_size, (length,), device=device) for length in lengths]
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    losses = {}
    for turn in range(options.rounds + 1):
        for name, (attention, way) in WAYS.items():
            model.set_attn_implementation(attention)
            taken, losses[name] = once(model, rows, way)
            if turn:  # the first is a warm-up
                seconds[name].append(taken)
    torch.testing.assert_close(list(losses.values()), [losses["padded"]] * len(losses), rtol=0.01, atol=0.01)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {"benchmark": "attention", "device": device, "rows": options.rows, "tokens": sum(lengths)}
    result["median_s"] = {name: round(value, 3) for name, value in medians.items()}
    result["rows_faster_than"] = {name: round(medians[name] / medians["rows"], 2) for name in ("padded", "masked")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
