"""`headway calibrate gact`, `caa` and `act`: vector profiles, from pairs of texts."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from headway.server.calibration import activations, caa, residual
from headway.server.calibration.held_out import check_clusters, fold_numbers, wilson
from headway.server.calibration.pairs import Pair, read_pairs
from headway.server.commands.calibrate_options import check_outputs, command_line, require_sklearn
from headway.server.commands.calibrate_vector_options import (
    SHARE,
    act_options,
    caa_options,
    gact_options,
)
from headway.server.commands.model import quiet_stdout, read_model, steerable_geometry
from headway.steering import ModelGeometry
from headway.steering.methods.base import check_layers
from headway.steering.vectors import (
    FeedbackRule,
    VectorHeader,
    VectorProfile,
    file_digest,
)


@dataclass(frozen=True)
class Measured:
    """The pairs of a file on a model; folds: in which each pair is held out, int64 [num_pairs]."""

    geometry: ModelGeometry
    pairs: tuple[Pair, ...]
    rows: activations.PairRows
    folds: np.ndarray


def add_commands(what: Any) -> None:
    """Add the three commands to the subparsers of `headway calibrate`."""
    for add, run in (
        (gact_options, calibrate_gact),
        (caa_options, calibrate_caa),
        (act_options, calibrate_act),
    ):
        options = add(what)
        options.set_defaults(run=run, options=options)


def calibrate_gact(args: argparse.Namespace) -> int:
    """Cluster directions, fit and judge probes, print, write profile, report and plot.

    Raises OSError or ValueError for a model, pairs, layers or an output that cannot be used.
    """
    require_sklearn()
    from headway.server.calibration import gact, gact_report

    measured = _measure(args, lambda model: activations.stream_taps(model, args.site))
    geometry, prompts = measured.geometry, measured.rows.prompts
    differences, clusters, seed = measured.rows.differences, args.clusters, args.seed
    found = gact.evaluate(prompts, differences, measured.folds, clusters, seed)
    chosen = _named_layers(args, geometry) or gact.choose_layers(found, args.num_layers)
    if not chosen:
        print(f"headway calibrate: {gact.explain_none(found)}", file=sys.stderr)
        return 1
    labels = gact.cluster_layers(differences, clusters, seed)
    sizes = [np.bincount(each, minlength=clusters).tolist() for each in labels]
    fits = [
        gact.fit_layer(prompts[:, layer], differences[:, layer], clusters, seed) for layer in chosen
    ]
    held_out = {
        "layers": list(chosen),
        "majority": [wilson(found.majority[layer]).rounded() for layer in chosen],
        "refined": [wilson(found.refined[layer]).rounded() for layer in chosen],
    }
    facts = {
        "clusters": clusters,
        "cluster_sizes": [fit.sizes for fit in fits],
        "refinement_epochs": [fit.epochs for fit in fits],
        "held_out_accuracy": held_out,
    }
    noted = args.strength
    if noted is None:
        noted = round(SHARE * math.sqrt(geometry.hidden_size), 4)
    header = _header(
        args,
        measured,
        "gact",
        facts,
        layers=chosen,
        site=args.site,
        strength=noted,
        feedback=FeedbackRule() if args.feedback else None,
    )
    print(_title(measured, f"{clusters} clusters, site {args.site}"))
    print(gact_report.table(found, sizes, chosen))
    print(gact_report.summary(found, seed))
    _save(gact.make_profile(header, fits), args)
    if args.report:
        figures = gact_report.report(found, sizes, seed)
        whole = {**header.model_dump(mode="json"), "fold_of_pair": measured.folds.tolist()}
        args.report.write_text(json.dumps({**whole, **figures}, indent=2) + "\n", encoding="utf-8")
        print(f"report: {args.report}")
    if args.plot:
        from headway.server.calibration.gact_plot import save_plot

        best = max(chosen, key=lambda layer: found.gains[layer])
        title = f"G-ACT probes of {geometry.architecture}, {len(measured.pairs)} pairs"
        save_plot(found, chosen, best, differences[:, best], labels[best], title, args.plot)
        print(f"plot: {args.plot}")
    return 0


def calibrate_caa(args: argparse.Namespace) -> int:
    """Take mean differences as directions, judge and print them, write the profile.

    Raises OSError or ValueError as `calibrate_gact` does.
    """
    measured = _measure(args, lambda model: activations.stream_taps(model, args.site))
    found = caa.separation(measured.rows.differences, measured.folds)
    chosen = _named_layers(args, measured.geometry) or caa.choose_layer(found)
    facts = {
        "normalized": args.normalize,
        "norms": [float(f"{found.norms[layer]:.6g}") for layer in chosen],
        "held_out_separation": [wilson(found.separated[layer]).rounded() for layer in chosen],
    }
    header = _header(
        args, measured, "caa", facts, layers=chosen, site=args.site, strength=args.strength
    )
    stream_norms = np.linalg.norm(measured.rows.prompts, axis=-1).mean(axis=0)
    print(_title(measured, f"site {args.site}"))
    print(caa.table(found, stream_norms, chosen))
    _save(caa.make_profile(header, measured.rows.differences, args.normalize), args)
    return 0


def calibrate_act(args: argparse.Namespace) -> int:
    """Fit and judge the probes of all heads, print them, write the shifts of the best.

    Raises OSError or ValueError as `calibrate_gact` does.
    """
    require_sklearn()
    from headway.server.calibration import act

    measured = _measure(args, activations.head_taps)
    texts = act.head_texts(measured.rows, measured.geometry.num_heads)
    accuracy = act.head_accuracy(texts, measured.folds)
    heads = act.choose_heads(accuracy, args.heads)
    if not heads:
        print(f"headway calibrate: {act.explain_none(accuracy)}", file=sys.stderr)
        return 1
    facts = {"held_out_accuracy": [round(float(accuracy[head]), 6) for head in heads]}
    header = _header(args, measured, "act", facts, heads=heads, strength=args.strength)
    print(_title(measured, f"{len(heads)} of {accuracy.size} heads chosen"))
    print(act.table(accuracy, heads))
    _save(act.make_profile(header, texts), args)
    return 0


def _measure(args: argparse.Namespace, taps: Callable[[Any], list[activations.Tap]]) -> Measured:
    """Run the model over the pairs; the seed is that of the folds."""
    check_outputs(args)
    pairs = read_pairs(args.pairs, args.target)
    topics = [pair.topic for pair in pairs]
    in_folds = fold_numbers([pair.prompt for pair in pairs], topics, args.folds, args.seed)
    check_clusters(in_folds, getattr(args, "clusters", 1))
    with quiet_stdout():
        geometry = steerable_geometry(read_model(args.model))
        _named_layers(args, geometry)  # before minutes of work
        model, tokenizer = residual.load_model(args.model)
        rows = activations.pair_rows(
            model, tokenizer, pairs, taps(model), args.read, args.batch_size
        )
    return Measured(geometry, pairs, rows, in_folds)


def _named_layers(args: argparse.Namespace, geometry: ModelGeometry) -> tuple[int, ...]:
    """The layers of --layers, ascending; none where it is not given. Raises ValueError."""
    runs = getattr(args, "layers", None)
    if not runs:
        return ()
    return tuple(check_layers([each for run in runs for each in run], geometry, "layers"))


def _header(
    args: argparse.Namespace, measured: Measured, kind: Any, facts: dict[str, Any], **found: Any
) -> VectorHeader:
    """The header of a profile, with what all kinds have."""
    geometry = measured.geometry
    training = {
        "pairs": args.pairs.name,
        "pairs_sha256": file_digest(args.pairs),
        "num_pairs": len(measured.pairs),
        "target": args.target,
        "read": str(args.read),
        "folds": args.folds,
        "seed": args.seed,
    }
    return VectorHeader(
        kind=kind,
        version=1,
        fingerprint=geometry.fingerprint,
        architecture=geometry.architecture,
        hidden_size=geometry.hidden_size,
        num_layers=geometry.num_layers,
        training={**training, **facts},
        licence=args.licence,
        command=command_line(args.options, args),
        **found,
    )


def _title(measured: Measured, what: str) -> str:
    geometry = measured.geometry
    return (
        f"{geometry.architecture}, {geometry.num_layers} layers, hidden size "
        f"{geometry.hidden_size}: {len(measured.pairs)} pairs, {what}; held-out figures of "
        f"{int(measured.folds.max()) + 1} folds, * chosen"
    )


def _save(profile: VectorProfile, args: argparse.Namespace) -> None:
    digest = profile.save(args.output)
    print(f"profile: {args.output} (sha256:{digest})")
