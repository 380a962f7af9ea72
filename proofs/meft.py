"""MEFT: bytes kept for backward flat in depth, the accuracy of ordinary training, and its gradients, on a small transformer classifier."""

from __future__ import annotations

import torch
from common import Report, options, spread
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import petiole as pt
from petiole.cost import saved_bytes

WIDTH, LENGTH, WORDS, ROWS, HELD, BATCH = 128, 16, 32, 1024, 512, 32
PRETRAINING, STEPS, RATE, BOTTLENECK = 150, 150, 2e-3, 8
DEPTHS = (4, 8, 16)
METHODS: dict[str, pt.Method] = {
    "parallel adapter": pt.ParallelAdapter(bottleneck=2 * BOTTLENECK, activation="gelu", init="bert"),
    **{f"MEFT{v}": pt.MEFT(variant=v, bottleneck=BOTTLENECK) for v in (1, 2, 3)},
}


def model(layers: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * WIDTH, vocab_size=WORDS, num_labels=4,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def data(count: int, seed: int, target: bool) -> dict[str, Tensor]:
    """Random words. Pre-training asks which quarter of the vocabulary is the most frequent one; the target, which one holds the
    largest word of the first half."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (count, LENGTH), generator=generator)
    quarter = ids % 4
    labels = torch.stack([(quarter == k).sum(1) for k in range(4)], 1).argmax(1)
    if target:
        labels = quarter.gather(1, ids[:, : LENGTH // 2].argmax(1, keepdim=True)).squeeze(1)
    return {"input_ids": ids, "labels": labels}


def fit(
    net: nn.Module, parameters: list[nn.Parameter], rows: dict[str, Tensor], steps: int, rate: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.06, anneal_strategy="linear"
    )
    net.train()
    for _ in range(steps):
        index = torch.randint(len(rows["labels"]), (BATCH,), generator=generator)
        net(**{name: value[index] for name, value in rows.items()}).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(net: nn.Module, rows: dict[str, Tensor]) -> float:
    logits = net.eval()(input_ids=rows["input_ids"]).logits
    return 100 * float((logits.argmax(1) == rows["labels"]).float().mean())


def kept(method: pt.Method, layers: int) -> int:
    net = model(layers, 0)
    pt.attach(net, method)
    return saved_bytes(net, data(BATCH, 0, True))


def off(variant: int, layers: int, seed: int, double: bool) -> float:
    """The worst relative error of an adapter's gradient against autograd on the same two streams."""
    found = []
    for count in (None, 0):
        net = model(layers, seed)
        tuned = pt.attach(net, pt.MEFT(variant=variant, bottleneck=BOTTLENECK, num_reversible=count), seed=seed)
        net = (net.double() if double else net).train()
        net(**data(BATCH, seed, True)).loss.backward()
        found.append([p.grad for s in tuned.slots if s.number >= 0 for p in s.delta.parameters()])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))  # type: ignore[operator,union-attr]


def main() -> None:
    given = options(__doc__)
    report = Report(
        "meft",
        "MEFT",
        f"A transformer of 4 layers and width {WIDTH} is pre-trained for {PRETRAINING} steps on random words (which class of words is the "
        f"most frequent), then tuned for {STEPS} steps on another question about them (the class of the largest word in the first half): "
        f"AdamW, {RATE} at most, {BATCH} rows of {LENGTH} words, the task head trains too. Accuracy in percent on {HELD} held-out rows; "
        "bytes kept for backward at 16 layers over those at 4, with anchors and without any; the worst relative error of an adapter's "
        "gradient against autograd on the same two streams, at 4 layers in float64 and at 12 in float32.",
        (
            "method",
            "accuracy",
            "bytes 16 / 4",
            "without anchors",
            "kB at 16 layers",
            "error, float64",
            "error, float32",
        ),
    )
    scores: dict[str, list[float]] = {name: [] for name in METHODS}
    errors: dict[int, dict[bool, list[float]]] = {v: {True: [], False: []} for v in (1, 2, 3)}
    for seed in range(given.seeds):
        base = model(4, seed)
        fit(base, list(base.parameters()), data(ROWS, seed, False), PRETRAINING, 1e-3, seed)
        state = base.state_dict()
        for name, method in METHODS.items():
            net = model(4, seed)
            net.load_state_dict(state)
            tuned = pt.attach(net, method, seed=seed)
            fit(net, list(tuned.parameters()), data(ROWS, 100 + seed, True), STEPS, RATE, seed)
            scores[name].append(accuracy(net, data(HELD, 200 + seed, True)))
        for variant in errors:
            for double, layers in ((True, 4), (False, 12)):
                errors[variant][double].append(off(variant, layers, seed, double))
    growth: dict[str, tuple[float, float]] = {}
    for name, method in METHODS.items():
        bare = method.model_copy(update={"anchor_every": None}) if isinstance(method, pt.MEFT) else method
        anchored, flat = ([kept(each, n) for n in DEPTHS] for each in (method, bare))
        growth[name] = anchored[-1] / anchored[0], max(flat) / min(flat)
        variant = getattr(method, "variant", 0)
        worst = [max(errors[variant][double]) if variant else "" for double in (True, False)]
        report.row(name, spread(scores[name]), *growth[name], round(anchored[-1] / 1e3), *worst)

    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    reversible = [name for name in METHODS if name.startswith("MEFT")]
    ordinary = growth["parallel adapter"][1]
    report.require(
        f"without anchors the bytes kept at 4, 8 and 16 layers are within 5 % of each other: {spread([growth[n][1] for n in reversible])}",
        all(growth[n][1] <= 1.05 for n in reversible),
    )
    report.require(f"with ordinary autograd they grow {ordinary:.2f} times from 4 to 16 layers", ordinary > 3)
    report.require(
        "mean accuracy is within 2 points of ordinary autograd's or above: "
        + ", ".join(f"{name} {mean[name]:.1f}" for name in mean),
        all(mean[n] >= mean["parallel adapter"] - 2 for n in reversible),
    )
    report.require(
        "gradients are right to 1e-9 in float64 at 4 layers", all(max(e[True]) <= 1e-9 for e in errors.values())
    )
    report.require("and to 1e-3 in float32 at 12 layers", all(max(e[False]) <= 1e-3 for e in errors.values()))
    report.finish(
        given, {"accuracy": scores, "growth": growth, "errors": {v: list(e.values()) for v, e in errors.items()}}
    )


if __name__ == "__main__":
    main()
