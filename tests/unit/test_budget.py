"""Budgets: what is counted is what a removal leaves, and the mask is the smallest cut within the budget."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, CLIPConfig, LlamaConfig, RobertaConfig

import secateur
from secateur import cli
from secateur.choosing.budget import BudgetedSelection, within_budget
from secateur.errors import InvalidInputError, UnsupportedModelError
from secateur.measuring.cost import compare_latency, measure_cost
from secateur.measuring.latency_table import Kind, Level, measure_latency, shared_copy
from secateur.measuring.unit_costs import UnitCosts
from secateur.models.inputs import example_inputs, max_length
from secateur.removal.remove import remove_
from secateur.settings import Budget, Cut, Shape
from secateur.sites import gating
from secateur.sites.attention import find_sites
from secateur.units.masks import Mask
from secateur.units.scores import Scores
from secateur.units.select import select
from tests.support.tiny import CONFIGS, tiny_model, tiny_texts, tiny_tokenizer, uneven_mask

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_counted_cost_is_the_cost_after_the_removal(kind, empty):
    model = tiny_model(kind)
    sites = find_sites(model)
    costs = UnitCosts(model, sites, 2, 16)
    assert costs.dense == measure_cost(model, 2, 16)
    mask = uneven_mask(sites, empty)
    counted = costs.after(mask)
    remove_(model, mask, sites=sites)
    assert counted == measure_cost(model, 2, 16)
    assert counted.macs < costs.dense.macs


def test_work_is_counted_with_and_without_the_models_own_eager_attention(monkeypatch):
    """It fails in one model of transformers 5, which runs with PyTorch's alone."""
    model = tiny_model("llama")
    own = gating._own_function
    with monkeypatch.context() as patch:
        patch.setattr(gating, "_own_function", lambda kind, of: None if kind == "eager" else own(kind, of))
        counted = measure_cost(model, 2, 16).macs
    model.set_attn_implementation("eager")
    assert measure_cost(model, 2, 16).macs == counted


CLIP = CLIPConfig(
    text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37,
                 "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2},
    vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37,
                   "image_size": 16, "patch_size": 8},
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (CONFIGS["bert"](), 512),
        (RobertaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99), 510),
        (CONFIGS["gpt2"](), 1024),
        (CONFIGS["opt"](), 2048),  # counts from 2 up, in a table that is as much longer
        (LlamaConfig(**{**CONFIGS["llama"]().to_diff_dict(), "max_position_embeddings": 64}), 64),
        (CLIP, 77),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_length_is_what_positions_allow(config, length):
    model = AutoModel.from_config(config)
    assert max_length(model) == length
    with torch.no_grad():
        model.eval()(**example_inputs(model, 1, length, padding=0))
    assert measure_cost(model, 1, 10**6).length == length


def test_a_text_beside_a_picture_is_cut_to_its_own_positions():
    """The positions stand in a config within the config."""
    model = AutoModel.from_config(CLIP)
    assert max_length(model, 1 << 20) == 77
    _, report = secateur.prune(model, scorer="magnitude")
    assert (report.before.heads, report.after.heads, report.before.length) == (8, 4, 77)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("heads=0.5", Budget("heads", 0.5)),
        ("params=0.95x", Budget("params", 0.95)),
        ("macs=.85", Budget("macs", 0.85, Shape(1, 128))),
        ("macs=0.85@1x512", Budget("macs", 0.85, Shape(1, 512))),
        (" latency=0.8x@8x128 ", Budget("latency", 0.8, Shape(8, 128))),
    ],
)
def test_budgets_are_read_and_written(text, budget):
    assert Budget.parse(text) == budget
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text",
    ["", "0.5", "heads", "heads=0", "heads=1.5", "flops=0.5", "latency=0.8", "heads=0.5@8x128", "macs=1..3", None],
)
def test_other_budgets_are_refused(text):
    with pytest.raises(InvalidInputError, match="`budget` must be heads="):
        Budget.parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        ("flops", 0.5),
        ("macs", 85),
        ("macs", 0),
        ("heads", True),
        ("params", "half"),
        ("latency", 0.8, (8, 128)),
        (3, 1),
    ],
)
def test_budgets_made_by_hand_are_checked_too(fields):
    with pytest.raises(InvalidInputError, match=r"`budget` must be heads=.*, got Budget\(quantity="):
        Budget(*fields)


def test_a_budget_says_what_may_remain_and_a_ratio_what_may_go():
    scores = Scores({"a": torch.tensor([1.0, 2.0, 3.0])})
    mask, ratio = within_budget(scores, 0.5, lambda mask: mask.num_kept / mask.num_units)
    assert mask.kept == {"a": [2]}
    assert ratio == pytest.approx(2 / 3)
    assert select(scores, 0.5).kept == {"a": [1, 2]}


def test_a_larger_ratio_takes_all_that_a_smaller_one_takes():
    """Also where units go one at a time at "a" and four at a time at "b"; what does not fit ends the ranking."""
    scores = Scores({"a": torch.tensor([0.1, 2, 3, 9]), "b": torch.tensor([0.5] * 4 + [5.0] * 4)}, {"b": 2})
    kept = [select(scores, k / 12, "ranking").num_kept for k in range(12)]
    assert kept == [12, 11, 11, 11, 11, 7, 6, 5, 5, 5, 5, 5]

    def left(mask):
        return mask.num_kept / 12

    mask, ratio = within_budget(scores, 9 / 12, left, "ranking")
    assert (mask.kept, ratio) == ({"a": [1, 2, 3], "b": [4, 5, 6, 7]}, 5 / 12)


def test_only_ratios_are_tried_at_which_another_mask_begins():
    """Of 4,096 neurons beside heads that share weights: those that leave a multiple of 32."""
    scores = Scores(
        {"heads": torch.arange(12.0), "neurons": torch.arange(4096.0)},
        {"heads": 4, "neurons": 4096},
        kinds={"neurons": "neurons"},
    )
    tried = []

    def left(mask):
        tried.append(mask.num_kept)
        return int(mask["neurons"].sum()) / 4096

    mask, ratio = within_budget(scores, 0.5, left)
    assert (int(mask["neurons"].sum()), ratio) == (2048, 0.5)
    assert len(tried) <= 4096 / 32 / 2 + 12


def test_masks_that_are_rounded_are_tried_in_turn():
    """Rounding gives a whole site back, so that fewer heads may leave more."""
    alike = Scores({"a": torch.tensor([1.0, 2, 3, 9])})

    def rounded(mask):
        return Mask({"a": mask["a"] | (mask.num_kept == 2)})

    mask, ratio = within_budget(alike, 3 / 4, lambda mask: mask.num_kept / 4, "ranking", rounded=rounded)
    assert (mask.num_kept, ratio) == (3, 1 / 4)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.sampled_from(["uniform", "ranking"]),
    st.integers(0, 2),
    st.randoms(use_true_random=False),
)
def test_the_budget_is_met_monotone_and_not_overdone(shapes, one, other, allocation, floor, random):
    sizes = {str(i): groups * group for i, (groups, group) in enumerate(shapes)}
    scores = Scores(
        {site: torch.tensor([random.random() for _ in range(size)]) for site, size in sizes.items()},
        {str(i): groups for i, (groups, _) in enumerate(shapes)},
    )
    price = {site: random.uniform(0.1, 1) for site in sizes}
    whole = 1 + sum(price[site] * size for site, size in sizes.items())  # 1: what no head owns

    def share(mask):
        return (1 + sum(price[site] * int(row.sum()) for site, row in mask.items())) / whole

    low, high = sorted((one, other))
    found = within_budget(scores, low, share, allocation, floor)
    looser = within_budget(scores, high, share, allocation, floor)
    total = sum(sizes.values())
    steps = {total} if allocation == "ranking" else set(sizes.values())
    ratios = sorted({k / size for size in steps for k in range(size)})
    if found is None:
        assert all(share(select(scores, ratio, allocation, floor)) > low for ratio in ratios)
        return
    mask, ratio = found
    assert share(mask) <= low + 1e-9
    assert mask.kept == select(scores, ratio, allocation, floor).kept
    assert all(share(select(scores, smaller, allocation, floor)) > low for smaller in ratios if smaller < ratio)
    assert looser is not None
    assert looser[0].num_kept >= mask.num_kept


@pytest.mark.parametrize(
    ("kind", "allocation", "budget"),
    [
        ("bert", "uniform", "heads=0.6"),
        ("bart", "ranking", "params=0.93"),
        ("bart", "uniform", "macs=0.9@2x16"),
        ("llama", "uniform", "params=0.93"),
        ("llama", "ranking", "macs=0.9@2x16"),
    ],
)
def test_pruning_keeps_within_the_budget(kind, allocation, budget):
    model = tiny_model(kind)
    cut = Cut(budget=budget, units=("heads",), allocation=allocation)
    smaller, report = secateur.prune(model, scorer="magnitude", cut=cut)
    (outcome,) = report.budget
    assert outcome.reached == outcome.expected <= outcome.budget.limit
    if outcome.budget.quantity == "heads":
        assert outcome.reached == report.after.heads / report.before.heads
    mask = secateur.allocate(model, report.scores, budget=budget, allocation=allocation)
    assert mask.kept == report.mask.kept
    # One head more would have been too many: the mask of the next smaller ratio exceeds the budget.
    within = BudgetedSelection(model, cut)
    step = 1e-6 if allocation == "uniform" else 1 / report.before.heads
    before = select(report.scores, report.requested_ratio - step, allocation)
    assert within.outcomes(before, model)[0].expected > outcome.budget.limit
    assert measure_cost(smaller).heads == report.after.heads


def test_a_budget_for_a_model_that_lost_heads_counts_from_what_is_there():
    model = tiny_model("bert")
    remove_(model, uneven_mask(find_sites(model)))
    heads = measure_cost(model).heads
    _, report = secateur.prune(model, scorer="magnitude", budget="heads=0.5", cut=Cut(allocation="ranking"))
    assert report.before.heads == heads
    assert report.after.heads == heads // 2


@pytest.mark.parametrize("arguments", [{}, {"allocation": "ranking"}, {"budget": "heads=0.5"}, {"floor": 0}])
def test_a_model_without_heads_is_refused(arguments):
    model = tiny_model("bert")
    remove_(model, Mask({name: torch.zeros(4, dtype=torch.bool) for name in find_sites(model)}))
    with pytest.raises(UnsupportedModelError, match="BertModel has no attention heads left to remove; prune the model"):
        secateur.prune(model, scorer="magnitude", cut=Cut(**arguments))
    scores = secateur.score(model, scorer="magnitude")
    with pytest.raises(UnsupportedModelError, match="no attention heads left"):
        secateur.allocate(model, scores, budget="macs=0.9", allocation=arguments.get("allocation", "uniform"))


def test_a_budget_that_heads_cannot_reach_is_refused_before_scoring(monkeypatch):
    monkeypatch.setattr("secateur.pruning_work.score", lambda *a, **k: pytest.fail("scored"))
    with pytest.raises(InvalidInputError, match=r"`budget` must be at least params=(0\.\d+), .*0\.750") as caught:
        secateur.prune(tiny_model("bert"), scorer="magnitude", budget="params=0.2", cut=Cut(units=("heads",)))
    least = str(caught.value).split("params=")[1].split(",")[0]
    monkeypatch.undo()
    _, report = secateur.prune(
        tiny_model("bert"), scorer="magnitude", budget=f"params={least}", cut=Cut(units=("heads",))
    )
    assert report.after.heads == 3


def test_refining_between_sites_could_exceed_a_budget():
    cut = Cut(budget="macs=0.9", allocation="ranking", refine=2, units=("heads",))
    with pytest.raises(InvalidInputError, match="`refine` must be 0 with allocation 'ranking' and the budget macs="):
        secateur.prune(tiny_model("bert"), tiny_texts(4), tokenizer=tiny_tokenizer(), cut=cut)


def kind_of(*levels):
    """Two sites; levels of (heads, saved, seconds of two rounds)."""
    return Kind(("a", "b"), tuple(Level(*level) for level in levels))


def test_time_saved_lies_between_what_was_measured():
    kind = kind_of((4, 0, [1.0, 2.0]), (2, 10, [0.8, 1.6]), (1, 30, [0.6, 1.2]))
    assert [2 * kind.saved(macs) for macs in (0, 5, 10, 20, 30, 99)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    # A level that took longer than the one before it counts for no less than nothing.
    slower = kind_of((2, 0, [1.0, 1.0]), (1, 10, [1.1, 1.1]))
    assert slower.saved(0) == slower.saved(10) == 0


def test_heads_are_rounded_up_only_where_more_were_faster():
    slow = [0.85, 0.9, 0.95, 0.9]
    kind = kind_of((8, 0, [1.0] * 4), (7, 1, [0.9] * 4), (6, 2, [0.8] * 4), (5, 3, slow), (4, 4, [0.7] * 4))
    assert [kind.rounded(heads) for heads in (8, 7, 6, 5, 4, 3)] == [8, 7, 6, 6, 4, 3]
    noise = kind_of((2, 0, [1.0, 1.0, 1.0, 1.0]), (1, 1, [0.9, 1.1, 0.9, 1.1]))
    assert noise.rounded(1) == 1


def test_sites_are_given_back_their_best_heads_where_that_is_faster(monkeypatch):
    model = tiny_model("bert")
    names = tuple(find_sites(model))
    # Three heads took longer than four.
    table = Kind(names, (Level(4, 0, [1.0]), Level(3, 1, [1.2]), Level(2, 2, [0.5]), Level(1, 3, [0.4])))
    monkeypatch.setattr(
        "secateur.choosing.budget.measure_latency",
        lambda base, costs, shape, progress: type("Table", (), {"kinds": (table,), "to_json": dict})(),
    )
    rows = {name: torch.tensor([4.0, 3.0, 2.0, 1.0]) for name in names}
    rows[names[0]] = torch.tensor([0.5, 0.4, 7.0, 8.0])  # the two lowest, then heads of the others
    within = BudgetedSelection(model, Cut(budget="latency=1@1x16", allocation="ranking", units=("heads",)))
    scores = Scores(rows)
    one_less = select(scores, 1 / 12, "ranking")
    assert one_less.kept[names[0]] == [0, 2, 3]
    assert within._rounded(scores, one_less).kept[names[0]] == [0, 1, 2, 3]
    two_less = select(scores, 2 / 12, "ranking")
    assert within._rounded(scores, two_less).kept == two_less.kept


@pytest.mark.parametrize("allocation", ["uniform", "ranking"])
@pytest.mark.parametrize(("budget", "kept"), [("heads=0.9", [1, 2]), ("latency=0.999@1x8", [1, 2, 3])])
def test_sites_without_scores_stay_whole_within_a_budget(budget, kept, allocation, monkeypatch):
    model = tiny_model("bert")
    names = tuple(find_sites(model))
    levels = (Level(4, 0, [1.0]), Level(3, 1, [0.9]), Level(2, 2, [0.8]), Level(1, 3, [0.7]))
    monkeypatch.setattr(
        "secateur.choosing.budget.measure_latency",
        lambda base, costs, shape, progress: type("Table", (), {"kinds": (Kind(names, levels),)})(),
    )
    scores = Scores({names[1]: torch.tensor([1.0, 4.0, 3.0, 2.0])})
    assert secateur.allocate(model, scores, budget=budget, allocation=allocation).kept == {names[1]: kept}


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_table_is_measured_by_kind_of_site(kind):
    model = tiny_model(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sites = find_sites(model)
    table = measure_latency(model, UnitCosts(model, sites), Shape(1, 4), rounds=1)
    (only,) = table.kinds
    assert set(only.sites) == set(sites)
    heads = [level.units for level in only.levels]
    assert heads[0] == next(iter(sites.values())).num_units
    assert heads[-1] == 1
    assert sorted(level.saved_macs for level in only.levels) == [level.saved_macs for level in only.levels]
    assert all(len(level.seconds) == 1 and level.seconds[0] > 0 for level in only.levels)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_copy_shares_what_no_head_owns_and_may_lose_heads():
    model = tiny_model("bert")
    sites = find_sites(model)
    other = shared_copy(model, sites)
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    owned = {piece.parameter for site in sites.values() for piece in site.slices}
    assert {name for name in mine if mine[name] is not theirs[name]} == owned
    remove_(other, uneven_mask(sites))
    assert measure_cost(model).heads == 12 > measure_cost(other).heads


def test_prune_within_a_latency_budget(monkeypatch):
    for name, function in (("measure_latency", measure_latency), ("compare_latency", compare_latency)):
        monkeypatch.setattr(f"secateur.choosing.budget.{name}", partial(function, rounds=1))
    model = tiny_model("bert")
    _, report = secateur.prune(model, scorer="magnitude", budget="latency=1.0x@1x4", cut=Cut(units=("heads",)))
    assert report.after.heads == report.before.heads
    (found,) = json.loads(json.dumps(report.to_json()))["budget"]
    assert found["asked"] == "latency=1@1x4"
    assert found["reached"] > 0
    assert [level["units"] for level in found["latency_table"]["kinds"][0]["levels"]] == [4, 3, 2, 1]
    assert "(budget latency=1@1x4)" in str(report)


def test_command_line(minilm_folder, tmp_path, capsys):
    texts = tmp_path / "texts.csv"
    texts.write_text("sentence\n" + "\n".join(f"film number {i}" for i in range(8)))
    out = tmp_path / "out"
    given = ["prune", str(minilm_folder), "--data", str(texts), "--scorer", "magnitude", "--no-maps"]
    given += ["--units", "heads"]
    assert cli.main([*given, "--budget", "macs=0.85", "--out", str(out)]) == 0
    assert "kept 42 of 72 heads (pruning ratio 0.42), macs 0.847 of what they were" in capsys.readouterr().out
    assert "macs=0.85@1x128, reached 0.847" in (out / "report.html").read_text()
    for extra, message in (
        (["--budget", "macs=0.85", "--ratio", "0.5"], "`ratio` must be left out"),
        (["--budget", "macs=2"], "`budget` must be heads="),
        (["--budget", "macs=0.2"], "`budget` must be at least macs=0.66"),
    ):
        assert cli.main([*given, *extra, "--out", str(tmp_path / "no")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
