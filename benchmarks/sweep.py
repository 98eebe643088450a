"""Every model type that transformers can build offline: can its heads be captured, gated, removed, saved, reloaded?

    python -m benchmarks.sweep [--only TYPE …] [--timeout 900]

Each type is built tiny, with random weights, in a process of its own, and checked by plain means that share no code
with secateur's proof. Writes benchmarks/results/sweep.json and docs/coverage.md, and exits with 1 where a type came
out silently wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

import torch
from benchmarks.battery import failures
from benchmarks.other_units import check_layers, check_neurons
from benchmarks.outputs import difference, tensors, uneven_mask
from benchmarks.ready_inputs import has_examples, ready_inputs
from benchmarks.tiny_configs import CANDIDATES, candidate
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES

from secateur.errors import SecateurError, UnsupportedModelError
from secateur.models.base_model import base_of
from secateur.removal.remove import gated, remove_
from secateur.sites.attention import find_sites
from secateur.sites.gating import probe
from secateur.sites.layout import AttentionSite
from secateur.support.files import write_text
from secateur.units.masks import Mask

ROOT = Path(__file__).parents[1]
MOST_PARAMETERS = 20_000_000
MOST_MEMORY = 12 << 30
TOLERANCE = 1e-4
MOST_NEURONS = 0.9  # of the feed-forward parameters, for a type to count as one that loses neurons


class Wrong(Exception):
    """An independent check failed: what secateur accepted is not so."""


class NotShown(Exception):
    """The tiny random model cannot show whether secateur is right; the message says why."""


def check_type(model_type: str) -> dict[str, Any]:
    """Run one model type through the battery. `outcome` is the last stage that it reached."""
    result: dict[str, Any] = {"type": model_type, "outcome": "not built"}
    try:
        model = build(model_type)
        inputs = ready_inputs(model)
        plain = run(model, inputs)
        if not plain:
            raise ValueError("the model returns no floating-point tensor")
        if not all(bool(torch.isfinite(t).all()) for t in plain):
            raise ValueError("the tiny random model returns NaN or infinity")
        if difference(plain, run(model, inputs)) > 0:
            raise ValueError("two passes over the same inputs differ, so nothing can be compared")
    except SecateurError as error:
        return {**result, "outcome": "refused", "reason": first_line(error), "stage": "inputs"}
    except Exception as error:
        return {
            **result,
            "reason": f"{type(error).__name__}: {first_line(error)}",
            "trace": traceback.format_exc()[-900:],
        }
    result |= {"outcome": "refused", "class": type(model).__name__, "parameters": model.num_parameters()}
    if not has_examples(model):
        result["inputs"] = "given"
        with contextlib.suppress(SecateurError):
            find_sites(model, inputs)  # what is captured past transformers' interface has to be found with them first
    stage = "captured"
    try:
        result |= capture(model, inputs, plain)
        result["outcome"] = "captured"
        stage = "gated"
        sites = find_sites(model, inputs)
        result["whole"] = len(sites) == result["sites"]
        check_gates(model, sites, inputs, plain)
        result["outcome"] = "gated"
        stage = "removed"
        mask = uneven_mask(sites)
        fresh = ready_inputs(model, batch=3, length=10, padding=2, seed=1)
        whole = dense_round_trip(model)
        removed = check_removal(model, mask, sites, inputs, fresh, result)
        result["outcome"] = "removed"
        stage = "reloaded"
        if whole:
            raise NotShown(whole)
        check_reload(model, fresh, removed)
        result["outcome"] = "reloaded"
    except SecateurError as error:
        result |= {"reason": first_line(error), "stage": stage}
    except NotShown as error:
        result |= {"reason": str(error), "stage": stage}
    except Wrong as error:
        result |= {"outcome": "WRONG", "reason": str(error), "stage": stage}
    except Exception as error:
        # Not an answer that a user could act on: a defect to mend, or a refusal to be worded.
        trace = traceback.format_exc()[-1500:]
        result |= {
            "reason": f"{type(error).__name__}: {first_line(error)}",
            "stage": stage,
            "trace": trace,
            "raw": True,
        }
    return result


def check_promises(model_type: str) -> dict[str, Any]:
    """Run one model type, whose sites are found, through the battery of benchmarks/battery.py."""
    return {"outcome": "tried", "failed_checks": failures(build(model_type))}


def row_of(model_type: str, timeout: float) -> dict[str, Any]:
    """Return all that is found of one model type, in a process for each battery, since either may take long."""
    row = in_child(check_type, model_type, timeout)
    if "whole" in row and "inputs" not in row:  # sites were found, by calls that make their inputs themselves
        tried = in_child(check_promises, model_type, timeout)
        row["failed_checks"] = tried.get("failed_checks", {"the battery": tried.get("reason", "")})
    if row["outcome"] != "not built":
        others = in_child(check_other_units, model_type, timeout)
        why = {"outcome": "stopped", "reason": others.get("reason", "")}
        row |= {kind: others.get(kind, why) for kind in ("neurons", "layers")}
    return row


def check_other_units(model_type: str) -> dict[str, Any]:
    """Run the neurons and the layers of one model type through benchmarks/other_units.py."""
    model = build(model_type)
    fails = dense_round_trip(model)
    neurons = check_neurons(copy.deepcopy(model), fails)
    return {"outcome": "tried", "neurons": neurons, "layers": check_layers(model, fails)}


def build(model_type: str) -> PreTrainedModel:
    """Return the first tiny model that builds and runs, with weights large enough that every head matters."""
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_MAPPING:
        raise ValueError("AutoModel knows no class for it")
    first: Exception | None = None
    for number in range(CANDIDATES):
        try:
            config = candidate(config_class, number)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModel.from_config(copy.deepcopy(config)).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"the smallest config found has {size / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = AutoModel.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point():
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            with contextlib.suppress(SecateurError):
                run(model, ready_inputs(model))
            return model
        except Exception as error:
            first = first or error
    raise first or ValueError("no config")


def capture(model: PreTrainedModel, inputs: Mapping[str, Any], plain: list[Tensor]) -> dict[str, Any]:
    """Stream the heads twice, with and without maps, and see that this changes nothing and that maps are maps."""
    heads: dict[str, int] = {}
    maps = 0

    def see(reading: Any) -> None:
        nonlocal maps
        heads[reading.site] = reading.outputs.shape[2]
        if reading.weights is not None:
            maps += 1
            row = reading.weights.detach().sum(dim=-1)
            if reading.weights.shape[1] != reading.outputs.shape[2] or float(row.max()) > 1 + 1e-4:
                raise Wrong(f"the map of {reading.site} has the shape {tuple(reading.weights.shape)}")

    with torch.no_grad(), probe(model, see):
        streamed = run(model, inputs)
    if difference(plain, streamed) > TOLERANCE:
        raise Wrong(f"reading the heads changes the outputs by {difference(plain, streamed):.2g}")
    note = ""
    try:
        with torch.no_grad(), probe(model, see, weights=True):
            streamed = run(model, inputs)
        if difference(plain, streamed) > TOLERANCE:
            raise Wrong(f"reading the maps changes the outputs by {difference(plain, streamed):.2g}")
    except Exception as error:
        no_maps = isinstance(error, UnsupportedModelError) and "does not compute attention maps" in str(error)
        if not no_maps and not own_eager_differs(model, inputs, plain):
            raise
        note = "no maps: " + (
            "the model computes none" if no_maps else "the model's own eager attention differs or fails"
        )
        maps = 0
    if not heads:
        find_sites(model, inputs)  # says why
        raise Wrong("no head was seen, but sites were found")
    return {"sites": len(heads), "heads": sum(heads.values()), "maps": maps > 0} | ({"note": note} if note else {})


def own_eager_differs(model: PreTrainedModel, inputs: Mapping[str, Any], plain: list[Tensor]) -> bool:
    """Is it transformers' own eager attention, the only one with maps, that does not do what its default does?"""
    twin = copy.deepcopy(model)
    try:
        twin.set_attn_implementation("eager")
        return difference(plain, run(twin, inputs)) > TOLERANCE
    except Exception:
        return True


def check_gates(
    model: PreTrainedModel, sites: Mapping[str, AttentionSite], inputs: Mapping[str, Any], plain: list[Tensor]
) -> None:
    """Ones change nothing; a closed gate does what zeros in the output projection do, and that is not nothing."""
    with probe(model, gates={name: torch.ones(site.num_units) for name, site in sites.items()}):
        moved = difference(plain, run(model, inputs))
    if moved > TOLERANCE:
        raise Wrong(f"gates of ones change the outputs by {moved:.2g}")
    for name, site in list(sites.items())[:6]:
        head = site.num_units - 1
        gate = torch.ones(site.num_units)
        gate[head] = 0
        with probe(model, gates={name: gate}):
            gated = run(model, inputs)
        twin = copy.deepcopy(model)
        projection: Any = base_of(twin).get_submodule(site.output)
        # By position alone, not by what secateur found the head to own: heads lie side by side in what is read.
        columns = slice(head * site.width, (head + 1) * site.width)
        with torch.no_grad():
            if isinstance(projection, torch.nn.Linear):
                projection.weight[:, columns] = 0
            else:
                projection.weight[columns] = 0
        if difference(gated, run(twin, inputs)) > TOLERANCE:
            raise Wrong(f"closing head {head} of {name} is not the same as zeros in {site.output}")
        if difference(gated, plain) == 0:
            # Zeros in the projection do nothing either, as was just seen: it is the model.
            raise NotShown(f"the tiny random model's outputs do not depend on head {head} of {name}")


def check_removal(
    model: PreTrainedModel,
    mask: Mask,
    sites: Mapping[str, AttentionSite],
    inputs: Mapping[str, Any],
    fresh: Mapping[str, Any],
    result: dict[str, Any],
) -> list[Tensor]:
    """Compare gated and removed on inputs that the proof has not seen; return what the removed model says."""
    dense = run(model, fresh)
    with gated(model, mask, sites):
        preview = run(model, fresh)
    before = model.num_parameters()
    remove_(model, mask, inputs=inputs, sites=sites)
    removed = run(model, fresh)
    result["difference"] = difference(preview, removed)
    result["kept"] = str(mask.num_kept)
    result["parameters_after"] = model.num_parameters()
    if result["difference"] > TOLERANCE:
        raise Wrong(f"removed and gated differ by {result['difference']:.2g} on fresh inputs")
    if difference(dense, preview) <= TOLERANCE:
        raise NotShown("the tiny random model's outputs hardly depend on its heads, so equality shows nothing")
    if model.num_parameters() >= before:
        raise Wrong("no parameter went away")
    return removed


def check_reload(model: PreTrainedModel, fresh: Mapping[str, Any], removed: list[Tensor]) -> None:
    """Save, read with the plain Auto class, and ask for the same bits."""
    try:
        again = round_trip(model)
    except Exception as error:
        # Loud, and in a user's hands before anything is lost; but no answer that secateur words.
        raise NotShown(f"transformers cannot save and load the smaller model: {first_line(error)}") from error
    unequal = changed(model, again)
    if unequal:
        raise Wrong(f"{len(unequal)} tensors came back different, such as {unequal[0]}")
    for parameter in again.parameters():
        # What is read lies in the file as it comes; memory that starts elsewhere can change a product's last bit.
        parameter.data = parameter.data.clone()
    moved = difference(removed, run(again, fresh))
    if moved > 0:
        raise Wrong(f"the reloaded model's outputs differ by {moved:.2g}")


def round_trip(model: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = AutoModel.from_pretrained(folder).eval()
    if type(again) is not type(model):
        raise NotShown(f"AutoModel reads a {type(again).__name__} where a {type(model).__name__} was saved")
    return again


def changed(one: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    """Return the names of the tensors that the two models do not share bit for bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    missing = [name for name in theirs if name not in ours]
    return [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])] + missing


def dense_round_trip(model: PreTrainedModel) -> str:
    """Return why transformers alone does not bring the whole model back, or nothing where it does."""
    try:
        unequal = changed(model, round_trip(model))
    except Exception as error:
        return f"transformers itself does not bring the whole model back: {first_line(error)}"
    if unequal:
        return f"transformers itself brings {unequal[0]} of the whole model back different"
    return ""


@torch.no_grad()
def run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    return tensors(base_of(model)(**inputs))


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = re.sub(r"/[^\s'\"]*/site-packages/", "", text)  # where this machine keeps its packages is no news
    return text[:450] if text else type(error).__name__


def in_child(task: Callable[[str], dict[str, Any]], model_type: str, timeout: float) -> dict[str, Any]:
    """Run `task` in a fork, so that neither a crash, nor memory, nor a loop stops the sweep."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        torch.set_num_threads(1)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            sender.send(task(model_type))

    child = context.Process(target=work)
    child.start()
    sender.close()
    start = time.perf_counter()
    try:
        result = receiver.recv() if receiver.poll(timeout) else {"reason": f"no answer within {timeout:.0f} s"}
    except EOFError:
        result = {"reason": "the process ended without an answer"}
    if child.is_alive() and "reason" in result and "outcome" not in result:
        child.kill()
    child.join()
    return {"type": model_type, "outcome": "not built", **result, "seconds": round(time.perf_counter() - start, 2)}


def page(report: dict[str, Any]) -> str:
    """Write the coverage page."""
    rows = report["types"]
    groups: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in rows:
        groups[row["outcome"]].append(row)
    captured = [r for r in rows if r.get("sites")]
    summary = [
        ("model types that AutoModel knows", len(rows)),
        ("built as a tiny random model", len(rows) - len(groups["not built"])),
        ("heads captured", len(captured)),
        ("with attention maps", sum(bool(r.get("maps")) for r in captured)),
        ("removed and reloaded exactly", len(groups["reloaded"])),
        (
            "refused, or stopped, with a reason",
            sum(len(groups[g]) for g in ("refused", "captured", "gated", "removed")),
        ),
        ("silently wrong", len(groups["WRONG"])),
    ]
    if tried := [r for r in rows if "failed_checks" in r]:
        passed = sum(not r["failed_checks"] for r in tried)
        summary.append((f"every promise of benchmarks/battery.py kept, of {len(tried)} with sites", passed))
    for kind in ("neurons", "layers"):
        if tried := [r[kind] for r in rows if kind in r]:
            done = [one for one in tried if one["outcome"] == "reloaded" and one.get("share", 1) >= MOST_NEURONS]
            summary.append((f"{kind} removed and reloaded exactly", len(done)))
            summary.append((f"{kind} silently wrong", sum(one["outcome"] == "WRONG" for one in tried)))
    if tried := [r["layers"] for r in rows if "layers" in r]:
        alone = sum(bool(one.get("plain")) for one in tried)
        summary.append(("with a layer gone, loaded without secateur", alone))
    lines = [
        "# Which models",
        "",
        f"Made by `{report['command']}` on {report['date']} ({report['machine']}; transformers "
        f"{report['versions']['transformers']}, torch {report['versions']['torch']}). Raw results: "
        "[benchmarks/results/sweep.json](../benchmarks/results/sweep.json).",
        "",
        "Every model type was built tiny with random weights and run on made-up inputs of its kind. The checks are "
        "plain ones that share no code with secateur's own proof:",
        "",
        "- Gates of ones change nothing.",
        "- A closed gate equals zeros in the output projection.",
        "- The smaller model equals the gated one on inputs that the proof has not seen (float32, 1e-4).",
        "- What `AutoModel.from_pretrained` reads back is equal bit for bit.",
        "",
        "Models of several parts were given text alone where they take it. The sites counted are those that this "
        "reaches." + _said_of_inputs(rows),
        "",
        "| | types |",
        "|---|---:|",
        *[f"| {what} | {count} |" for what, count in summary],
        "",
        "## Removed and reloaded exactly",
        "",
        ", ".join(f"`{r['type']}`" for r in groups["reloaded"]) + ".",
        "",
    ]
    stopped = [r for g in ("removed", "gated", "captured", "refused", "WRONG") for r in groups[g]]
    lines += [
        "## Stopped short of that: refused, or not shown, with the reason",
        "",
        "| type | got as far as | reason |",
        "|---|---|---|",
    ]
    lines += [f"| `{r['type']}` | {r['outcome']} | {cell(r.get('reason', ''))} |" for r in stopped]
    if any("neurons" in r or "layers" in r for r in rows):
        lines += ["", "## Neurons and layers that stay", "", "| type | kind | reason |", "|---|---|---|"]
    for kind in ("neurons", "layers"):
        for r in rows:
            found = r.get(kind, {})
            reasons = [*found.get("refused", {}).values()] if kind == "neurons" else []
            if found and (found["outcome"] != "reloaded" or reasons):
                text = found.get("reason") or (reasons[0] if reasons else _first_reason(found))
                lines.append(f"| `{r['type']}` | {kind} | {cell(text)} |")
    lines += ["", "## Could not be built offline from a tiny config", "", "| type | reason |", "|---|---|"]
    lines += [f"| `{r['type']}` | {cell(r.get('reason', ''))} |" for r in groups["not built"]]
    return "\n".join(lines) + "\n"


def _said_of_inputs(rows: list[dict[str, Any]]) -> str:
    given = [f"`{row['type']}`" for row in rows if "inputs" in row]
    if not given:
        return ""
    return f" No example inputs can be made of these types, which were given `inputs`: {', '.join(given)}."


def _first_reason(found: dict[str, Any]) -> str:
    """Return why a list of layers cannot lose one."""
    return next((one["reason"] for one in found.get("lists", {}).values() if "reason" in one), found["outcome"])


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:450]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", help="model types; writes no file")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a type")
    parser.add_argument("--trace", action="store_true", help="print where unexpected errors come from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    start = time.perf_counter()
    for model_type in options.only or list(MODEL_MAPPING_NAMES):
        row = row_of(model_type, options.timeout)
        trace = row.pop("trace", "")
        rows.append(row)
        print(f"{model_type:32} {row['outcome']:10} {row.get('reason', '')[:200]}", flush=True)
        for kind in ("neurons", "layers"):
            if kind in row:
                print(f"{'':32} {kind}: {row[kind]['outcome']} {row[kind].get('reason', '')[:150]}", flush=True)
        for name, how in row.get("failed_checks", {}).items():
            print(f"{'':32} {name}: {how[:200]}", flush=True)
        if options.trace and trace:
            print(trace)
    kinds = ("neurons", "layers")
    wrong = [r["type"] for r in rows if any(one["outcome"] == "WRONG" for one in (r, *(r[k] for k in kinds if k in r)))]
    counts = collections.Counter(r["outcome"] for r in rows)
    print(dict(counts), f"captured {sum(bool(r.get('sites')) for r in rows)}", f"{time.perf_counter() - start:.0f} s")
    if not options.only:
        report = {
            **provenance("python -m benchmarks.sweep"),
            "seconds": round(time.perf_counter() - start),
            "counts": dict(counts),
            "types": rows,
        }
        write_text(ROOT / "benchmarks" / "results" / "sweep.json", json.dumps(report, indent=1) + "\n")
        write_text(ROOT / "docs" / "coverage.md", page(report))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
