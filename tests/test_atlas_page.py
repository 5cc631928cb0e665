"""The page of the head atlas, in a real browser where there is one; it may ask nothing of any network."""

import json
import re
import shutil

import numpy as np
import pytest

from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.reports.atlas_page import atlas_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "</script><b>"
LONG = "antidisestablishmentarianism"
EDGE = ("sender", "receiver", "path", "score", "z")
SECTIONS = (
    "labels",
    "evidence",
    "attention",
    "spectra",
    "kernel",
    "pairs",
    "directions",
    "places",
    "contexts",
    "probes",
    "partners",
    "effects",
    "graph",
)
WORDS = (
    " the",
    " of",
    " a",
    "\n",
    " cat",
    " sat",
    " on",
    "ing",
    ",",
    ".",
    " When",
    " Mary",
    HOSTILE,
    " <i>&amp;",
    "é",
    "",
    LONG,
)


def made_atlas(n_layers, n_heads, n_states, length=48, rank=64):
    """Random, but of the atlas's shape."""
    rng = np.random.default_rng(0)
    lengths = (length, 3 * length // 4, length // 2)
    samples = [random_words(rng, n) for n in lengths]
    samples[0] = [HOSTILE, *WORDS, *samples[0]][:length]
    names = [f"step {100 * i}" for i in range(n_states)] if n_states > 1 else [""]
    return {
        "title": "Head atlas: <made up> & random",
        "facts": [("model", "random"), ("layers", n_layers), ("heads", n_heads), ("text", "three samples")],
        "notes": ["A label says what a head does on designed inputs, not that anything depends on it."],
        "n_layers": n_layers,
        "n_heads": n_heads,
        "types": {"qk": list(QK_TYPES), "ov": list(OV_TYPES)},
        "samples": samples,
        "captions": {name: f"About {name}." for name in SECTIONS},
        "states": [made_state(rng, n_layers, n_heads, name, lengths, rank) for name in names],
    }


def made_state(rng, n_layers, n_heads, name, lengths, rank):
    count = n_layers * n_heads
    effects = rng.normal(size=(n_layers, n_heads)).astype(np.float32)
    effects[0, 0] = np.nan
    maps = [
        {"name": "ablation", "about": "Rise of the loss.", "values": effects, "diverging": True},
        {"name": "copying score", "about": "Share.", "values": rng.random((n_layers, n_heads)), "diverging": False},
    ]
    ends = np.sort(rng.choice(count, size=(2, 2000)), axis=0)
    sender, receiver = ends[:, ends[0] // n_heads < ends[1] // n_heads]
    z = np.sort(rng.exponential(8.0, len(sender)))[::-1]
    path = rng.integers(3, size=len(z))
    edges = {"sender": sender, "receiver": receiver, "path": path, "score": z / 300, "z": z, "total": 28512}
    heads = [made_head(rng, index, edges, lengths, rank) for index in range(count)]
    return {"name": name, "maps": maps, "heads": heads, "edges": edges}


def made_head(rng, index, edges, lengths, rank):
    return {
        "qk": made_labels(rng, QK_TYPES),
        "ov": made_labels(rng, OV_TYPES),
        "evidence": made_evidence(rng),
        "spectra": {side: made_spectrum(rng, rank) for side in ("qk", "ov")},
        "pairs": {side: [("any query", *random_words(rng, 1), x) for x in (9, 8, 7, -6, -5)] for side in ("qk", "ov")},
        "kernel": {"offset": np.arange(-8, 16), "value": rng.random(24), "chance": np.linspace(0.5, 0.1, 24)},
        "directions": [made_direction(rng, 3 if i == 2 else 1, 9.0 - i) for i in range(6)],
        "places": [made_direction(rng, 1, 1.5, "position 7")],
        "contexts": [in_context(made_direction(rng, 1, 2.0))],
        "probes": [{"name": "months", "gain": 2.3, "own": 0.81, "nearest": [("days", 0.3)], "tokens": ranked(rng, 6)}],
        "partners": made_partners(index, edges),
        "effects": [("ablation", 0.12), ("direct effect", -0.03)],
        "patterns": made_patterns(rng, lengths),
    }


def made_labels(rng, types):
    verdicts = ("supported", "structure only", "realised only", "structure")
    names = rng.choice(types, size=rng.choice(3, p=(0.35, 0.5, 0.15)), replace=False)
    return [
        {
            "name": str(name),
            "verdict": str(rng.choice(verdicts)),
            "confidence": rng.uniform(0.5, 1.0),
            "note": "offset 3" if name == "fixed_offset" else "",
            "establishes": "weights prefer it on ideal inputs",
        }
        for name in names
    ]


def made_evidence(rng):
    def score():
        score, z, p, confidence = rng.normal(), 5 * rng.normal(), rng.random() ** 9, rng.random()
        return {"score": score, "z": z, "p": p, "confidence": confidence, "found": confidence > 0.8}

    types = [(name, side) for side, names in (("qk", QK_TYPES), ("ov", OV_TYPES)) for name in names]
    evidence = [
        {"type": name, "side": side, "weights": score(), "activations": score(), "own": rng.random()}
        for name, side in types
    ]
    evidence[-1]["weights"]["z"] = np.inf
    evidence[0]["weights"]["p"], evidence[1]["activations"]["p"], evidence[2]["weights"]["p"] = 0.0, 1e-300, 1e-30
    evidence[-1]["activations"] = evidence[-1]["own"] = None
    return evidence


def random_words(rng, count):
    return [WORDS[i] for i in rng.integers(len(WORDS), size=count)]


def ranked(rng, count, form="{}"):
    values = np.sort(rng.normal(size=count))[::-1]
    return [(form.format(word), value) for word, value in zip(random_words(rng, count), values, strict=True)]


def made_direction(rng, size, sigma, form="{}"):
    def side():
        bottom = ranked(rng, 8, form) if size == 1 else []
        return {"top": ranked(rng, 8, form), "bottom": bottom, "control": rng.uniform(0.8, 1.0)}

    return {"sigma": sigma, "size": size, "query": side(), "key": side()}


def in_context(direction):
    """The first token holds a bracket, as the text before it does."""
    for side in ("query", "key"):
        for end in ("top", "bottom"):
            words = ["[a[0]", *(word for word, _ in direction[side][end][1:])]
            values = [value for _, value in direction[side][end]]
            direction[side][end] = [(" the [quick\nfox", *pair) for pair in zip(words, values, strict=True)]
    return direction


def made_partners(index, edges):
    partners = {"sends": [], "receives": []}
    for sender, receiver, path, score, z in zip(*(edges[name][:400] for name in EDGE), strict=True):
        if sender == index:
            partners["sends"].append((receiver, "qkv"[path], score, z))
        if receiver == index:
            partners["receives"].append((sender, "qkv"[path], score, z))
    return partners


def made_spectrum(rng, rank):
    sigma = -np.sort(-rng.exponential(size=rank))
    eigenvalues = (rng.normal(size=rank) + 1j * rng.normal(size=rank)).astype(np.complex64)
    summary = [("effective rank", 31.2, 40.1, -6.2), ("copying", 0.93, 0.5, 11.0), ("symmetry", 0.1, 0.0, np.nan)]
    middle = np.linspace(2.5, 0.1, rank)
    return {"sigma": sigma, "low": 0.9 * middle, "high": 1.1 * middle, "eigenvalues": eigenvalues, "summary": summary}


def made_patterns(rng, lengths):
    longest = max(lengths)
    patterns = np.zeros((len(lengths), longest, longest))
    for pattern, length in zip(patterns, lengths, strict=True):
        weights = np.tril(np.exp(3 * rng.normal(size=(length, length))))
        pattern[:length, :length] = weights / weights.sum(-1, keepdims=True)
    return np.round(255 * patterns).astype(np.uint8)


# --- the text of the page ---


def test_data_come_back_rounded():
    atlas = made_atlas(1, 2, 1, length=12, rank=4)
    head = atlas["states"][0]["heads"][1]
    head["spectra"]["qk"]["sigma"] = np.array([12345.678, 0.00012345678, np.nan, np.inf])
    head["spectra"]["qk"]["eigenvalues"] = np.array([1.23456 - 2j])
    data = data_of(atlas_page(atlas))
    back = data["states"][0]["heads"][1]
    assert back["spectra"]["qk"]["sigma"] == [12350.0, 0.0001235, None, "Infinity"]
    assert back["spectra"]["qk"]["eigenvalues"] == [[1.235, -2.0]]
    assert data["samples"] == atlas["samples"]


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_text_cannot_become_markup():
    page = atlas_page(made_atlas(1, 2, 1, length=12, rank=4))
    assert HOSTILE not in page
    assert "<title>Head atlas: &lt;made up&gt; &amp; random</title>" in page
    assert page.count("</script>") == 2


def test_what_does_not_fit_is_named():
    atlas = made_atlas(1, 2, 1, length=12, rank=4)
    with pytest.raises(ValueError, match="states"):
        atlas_page(atlas | {"states": []})
    with pytest.raises(ValueError, match="must have 4 heads; got 2"):
        atlas_page(atlas | {"n_layers": 2})
    with pytest.raises(ValueError, match=r"head 0 .*uint8 \[1,12,12\]; got uint8 \[3, 12, 12\]"):
        atlas_page(atlas | {"samples": atlas["samples"][:1]})


# What people see who lack one kind of cone, on linear RGB (Machado, Oliveira & Fernandes 2009, severity 1).
CONES = {
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
# Linear RGB -> cone responses -> OKLab, where equal steps look equal.
TO_LMS = [[0.412221, 0.536333, 0.051446], [0.211903, 0.680700, 0.107397], [0.088302, 0.281719, 0.629979]]
TO_LAB = [[0.210454, 0.793618, -0.004072], [1.977998, -2.428592, 0.450594], [0.025904, 0.782772, -0.808676]]


def linear_rgb(code):
    value = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize(("side", "count"), [("qk", len(QK_TYPES)), ("ov", len(OV_TYPES))])
def test_colours_can_be_told_apart_and_written_on(side, count):
    style = atlas_page(made_atlas(1, 1, 1, length=8, rank=2)).split("</style>")[0]
    colours = np.array([linear_rgb(code) for code in re.findall(rf"--{side}-\d: (#\w+)", style)])
    assert len(colours) == count
    for matrix in CONES.values():
        seen = np.clip(colours @ np.transpose(matrix), 0, 1)
        lab = np.cbrt(seen @ np.transpose(TO_LMS)) @ np.transpose(TO_LAB)
        distances = np.linalg.norm(lab[:, None] - lab, axis=-1)[~np.eye(count, dtype=bool)]
        assert distances.min() > 0.1
    ink = linear_rgb(re.search(r"--on-label: (#\w+)", style)[1])
    luminance = np.array([0.2126, 0.7152, 0.0722])
    assert ((colours @ luminance + 0.05) / (ink @ luminance + 0.05)).min() > 4.5


# --- in the browser ---


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    with sync_api.sync_playwright() as play:
        running = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def atlases():
    """12 x 12 heads, a run of 5 states, one of 2 with weak edges, and weights alone."""
    return {
        "large": made_atlas(12, 12, 1),
        "steps": made_atlas(2, 4, 5, rank=16),
        "weak": weak(made_atlas(2, 4, 2, rank=4)),
        "bare": bare(made_atlas(2, 3, 1, rank=4)),
    }


@pytest.fixture(scope="module")
def files(atlases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    for name, atlas in atlases.items():
        (folder / f"{name}.html").write_text(atlas_page(atlas), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in atlases}


def bare(atlas):
    """Weights alone: no text, no vocabulary, nothing found."""
    none = ("qk", "ov", "directions", "contexts", "probes", "effects")
    empty = {
        **{key: [] for key in none},
        "pairs": {"qk": [], "ov": []},
        "partners": {"sends": [], "receives": []},
        "kernel": None,
        "patterns": np.zeros((0, 0, 0), np.uint8),
    }
    state = atlas["states"][0]
    nothing = {name: state["edges"][name][:0] for name in EDGE} | {"total": 0}
    heads = [{key: value for key, value in (head | empty).items() if key != "places"} for head in state["heads"]]
    whole = {key: value for key, value in atlas.items() if key != "captions"}
    return whole | {"samples": [], "states": [state | {"heads": heads, "edges": nothing, "maps": []}]}


def weak(atlas):
    """Few edges, none of them sure; maps that differ in size from step to step."""
    for number, state in enumerate(atlas["states"], start=1):
        state["edges"] = {name: state["edges"][name][:48] for name in EDGE} | {"total": 48, "z": np.full(48, 1.9)}
        state["maps"][1]["values"] = number * np.linspace(0.0, 1.0, 8).reshape(2, 4)
    atlas["states"][1]["edges"]["z"][:5] = 2.1
    return atlas


@pytest.fixture
def opened(browser, files):
    """Opens a page; at the end no error may have been written and nothing asked for but the file itself."""
    contexts, errors, requests = [], [], []

    def visit(name, address="", **settings):
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(files[name].as_uri() + address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert errors == []
    assert len([url for url in requests if not url.startswith("data:")]) == len(contexts)


def heading(page):
    return page.locator("#panel h2").inner_text()


def test_a_large_page_loads_fast(opened, files):
    assert files["large"].stat().st_size < 15e6
    page = opened("large")
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length > 0")
    timing = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    took = page.evaluate(f"Math.max({timing}, {paint})")
    print(f"{files['large'].stat().st_size / 1e6:.1f} MB, loaded in {took:.0f} ms")
    assert 0 < took < 2000
    assert page.locator("#grid button").count() == 144


def test_a_head_is_chosen_by_click_keys_and_link(opened):
    page = opened("large")
    page.locator("#grid button").nth(5 * 12 + 1).click()
    assert heading(page) == "Head 5.1"
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    assert heading(page) == "Head 6.2"
    assert page.locator("#grid [aria-selected=true]").count() == 1
    page.locator("#graph .node").nth(30).click()
    assert heading(page) == "Head 2.6"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Space")
    assert heading(page) == "Head 2.5"
    page.go_back()
    assert heading(page) == "Head 2.6"
    assert heading(opened("large", "#head=11.3")) == "Head 11.3"


def test_the_panel_shows_the_head(opened, atlases):
    page = opened("large", "#head=7.4")
    head = atlases["large"]["states"][0]["heads"][7 * 12 + 4]
    chips = page.locator("#panel .labels .chip").all_inner_texts()
    assert chips == [label["name"].replace("_", " ") for side in ("qk", "ov") for label in head[side]]
    assert page.locator("#panel .evidence tbody tr").count() == len(head["evidence"])
    assert page.locator("#panel svg").count() == 5
    captions = page.locator("#panel section > h3 + p.quiet").all_inner_texts()
    assert sorted([*captions, page.locator("#graph-caption").inner_text()]) == sorted(
        f"About {name}." for name in SECTIONS
    )
    assert page.get_by_text("subspace of 3 tied directions, 3 to 5").count() == 1
    sends = [f"{index // 12}.{index % 12}" for index, *_ in head["partners"]["receives"] + head["partners"]["sends"]]
    assert page.locator("#panel .link").all_inner_texts() == sends


def test_partners_lead_to_their_head(opened, atlases):
    page = opened("steps")
    assert page.locator("#step-name").inner_text() == atlases["steps"]["states"][-1]["name"]  # a run opens at its end
    link = page.locator("#panel .link").first
    name = link.inner_text()
    link.focus()
    page.keyboard.press("Enter")
    assert heading(page) == f"Head {name} {atlases['steps']['states'][-1]['name']}"
    assert page.evaluate("document.activeElement.id") == "panel"  # and not lost with the old link


def test_a_query_token_shows_where_it_looks(opened, atlases):
    page = opened("steps", "#head=0.1&step=0")
    tokens = page.locator("#panel .text .token")
    patterns = atlases["steps"]["states"][0]["heads"][1]["patterns"] / 255
    for sample, words in enumerate(atlases["steps"]["samples"]):
        page.locator("#sample").select_option(str(sample))
        tokens.nth(20).hover()
        shaded = tokens.evaluate_all("all => all.map(one => parseFloat(one.style.getPropertyValue('--weight')) / 100)")
        np.testing.assert_allclose(shaded, patterns[sample, 20, : len(words)], atol=1e-3)
        assert page.locator("#panel .text .query").inner_text() == tokens.nth(20).inner_text()
    page.locator("canvas").hover(position={"x": 3, "y": 100})
    assert "→ 0 “" in page.locator("#tip").inner_text()


def test_tokens_are_text(opened):
    page = opened("steps")
    assert page.locator("#panel .text .token").first.inner_text() == HOSTILE
    assert page.locator("#panel b", has_text="x").count() == 0
    texts = page.locator("#panel .text .token").all_inner_texts()
    assert {"␣the", "↵", "∅", "␣<i>&amp;"} <= set(texts)


def test_the_threshold_changes_the_edges(opened):
    page = opened("large")
    edges = page.locator("#graph .edge")
    before = edges.count()
    assert 100 < before <= 150
    page.locator("#threshold").focus()
    page.keyboard.press("End")
    assert edges.count() == 1
    page.keyboard.press("PageDown")
    more = edges.count()
    assert more > 100
    counts = []
    for box in page.locator("#paths input").all():
        box.uncheck()
        counts.append(edges.count())
    assert more > counts[0] > counts[1] > counts[2] == 0
    page.locator("#paths input").nth(1).check()
    edges.first.focus()
    page.keyboard.press("ArrowRight")
    assert re.fullmatch(r"\d+\.\d+ → \d+\.\d+ by K\nscore .+, z .+", page.locator("#tip").inner_text())


def test_steps(opened):
    page = opened("steps", "#head=1.2&step=2")
    assert heading(page) == "Head 1.2 step 200"
    labels = [page.locator("#grid").inner_text()]
    edges = [page.locator("#threshold-name").inner_text()]
    page.locator("#step").focus()
    page.keyboard.press("ArrowRight")
    assert heading(page) == "Head 1.2 step 300"
    assert page.url.endswith("#head=1.2&step=3")
    labels.append(page.locator("#grid").inner_text())
    edges.append(page.locator("#threshold-name").inner_text())
    assert labels[0] != labels[1]
    assert edges[0] != edges[1]


def test_colours_and_filter(opened, atlases):
    page = opened("large")
    state = atlases["large"]["states"][0]
    page.locator("#legend button", has_text="induction").click()
    found = sum(any(label["name"] == "induction" for label in head["qk"]) for head in state["heads"])
    assert page.locator("#grid button:not(.faded)").count() == found
    assert page.locator("#filtered").inner_text() == f"{found} of 144 heads"
    page.locator("#legend button", has_text="induction").click()
    assert page.locator(".faded").count() == 0
    page.locator("#colour").select_option(label="ablation")
    page.locator("#grid button").nth(1).hover()
    value = state["maps"][0]["values"][0][1]
    assert f"ablation: {value:.3g}".replace("-", "−") in page.locator("#tip").inner_text()
    assert page.locator("#scale").is_visible()


def test_dark_and_light(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (opened("steps", color_scheme=scheme) for scheme in ("light", "dark"))
    assert light.evaluate(ground) == "rgb(255, 255, 255)"
    assert dark.evaluate(ground) == "rgb(20, 23, 28)"
    dark.locator("#theme").click()
    assert dark.evaluate(ground) == "rgb(255, 255, 255)"


def test_nothing_is_wider_than_the_page(opened):
    page = opened("large")
    for width in (360, 820, 1440):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_weights_alone(opened):
    page = opened("bare")
    assert heading(page) == "Head 0.0"
    assert page.locator("#panel h3").all_inner_texts() == ["Labels", "Evidence", "Spectra"]
    assert page.locator("#composition").is_hidden()
    assert page.locator("#steps").is_hidden()


def section(page, title):
    return page.locator("#panel section", has=page.locator("h3", has_text=re.compile(f"^{title}$")))


def test_lowest_pairs_stand_apart(opened):
    rows = section(opened("steps"), "Token pairs").locator("table").first.locator("tbody tr")
    assert [index for index, row in enumerate(rows.all()) if "divided" in (row.get_attribute("class") or "")] == [3]
    assert rows.first.locator("td").first.inner_text() == "any query"  # and no "␣", since it is no token
    assert rows.first.locator(".token").count() == 1


def test_charts_have_their_values_as_tables(opened, atlases):
    page = opened("steps", "#head=0.1")
    head = atlases["steps"]["states"][-1]["heads"][1]
    page.locator("#panel .charted summary").evaluate_all("all => all.forEach((one) => one.click())")
    tables = page.locator("#panel .charted table")
    assert tables.count() == 5
    counts = [tables.nth(i).locator("tbody tr").count() for i in range(5)]
    assert counts == [16, 16, 16, 16, 24]
    spectrum = head["spectra"]["qk"]
    values = [float(text) for text in tables.first.locator("tbody tr").nth(2).locator("td").all_inner_texts()]
    expected = [3, *(spectrum[name][2] for name in ("sigma", "low", "high"))]
    np.testing.assert_allclose(values, expected, atol=0.06)
    last = tables.nth(4).locator("tbody tr")
    assert last.first.locator("td").all_inner_texts() == ["−8", f"{head['kernel']['value'][0]:.3f}", "0.500"]


def test_attention_by_offset_shows_chance(opened):
    kernel = section(opened("steps"), "Offsets")
    dashed = kernel.locator("polyline.chance").get_attribute("points").split()
    heights = [float(point.split(",")[1]) for point in dashed]
    assert len(heights) == 24
    assert np.all(np.diff(heights) > 0)  # downwards, as chance falls
    kernel.locator("rect.hit").first.hover()
    assert re.fullmatch(r"8 ahead: .+\nuniform 0\.5", kernel.page.locator("#tip").inner_text())


def test_values_stand_beside_tokens_and_contexts(opened, atlases):
    page = opened("steps", "#head=0.1")
    head = atlases["steps"]["states"][-1]["heads"][1]
    for title, key in (("Directions", "directions"), ("Positions", "places"), ("Contexts", "contexts")):
        shown = section(page, title).locator("td").nth(1).locator(".item .quiet").all_inner_texts()
        top = [entry[-1] for entry in head[key][0]["query"]["top"]]
        np.testing.assert_allclose([float(text.replace("−", "-")) for text in shown], top, rtol=0.006)
    first = section(page, "Contexts").locator(".context").first
    assert first.inner_text() == "␣the [quick↵fox[a[0]"
    assert first.locator("b").inner_text() == "[a[0]"
    assert section(page, "Positions").locator(".token").first.inner_text() == "position 7"


def test_long_tokens_are_cut(opened):
    page = opened("steps")
    cut = page.locator("#panel .text .token", has_text="antidis").first
    assert cut.inner_text() == LONG[:24] + "…"
    cut.hover()
    assert page.locator("#tip").inner_text() == LONG


def test_the_smallest_p(opened):
    rows = section(opened("steps", "#head=0.1"), "Evidence").locator("tbody tr")
    shown = [rows.nth(i).locator("td").nth(column).inner_text() for i, column in ((0, 3), (1, 7), (2, 3))]
    assert shown == ["<1e-38", "<1e-38", "1.0e−30"]


def test_edges_that_are_not_sure_are_left_out(opened):
    page = opened("weak", "#step=0")
    name = page.locator("#threshold-name")
    assert page.locator("#graph .edge").count() == 0
    assert name.inner_text() == page.locator("#threshold").get_attribute("aria-valuetext") == "z ≥ 2: none of 48 edges"
    page = opened("weak", "#step=1")
    assert page.locator("#graph .edge").count() == 5
    assert page.locator("#threshold-name").inner_text() == "z ≥ 2: 5 of 48 edges"
    said = opened("large").locator("#threshold-name").inner_text()
    assert re.fullmatch(r"z ≥ \S+: 150 of the strongest 1\d\d\d of 28,512 edges", said)


def test_map_colours_are_the_same_at_every_step(opened):
    page = opened("weak", "#step=0")
    page.locator("#colour").select_option(label="copying score")
    part = page.locator("#grid .head").last.locator(".part")
    shares = []
    for _ in range(2):
        assert re.sub(r"\s+", "", page.locator("#scale").inner_text()).startswith("02")
        shares.append(re.search(r"(\d+)%", part.get_attribute("style"))[1])
        page.locator("#step").press("ArrowRight")
    assert shares == ["50", "100"]


def test_steps_are_named_and_folds_stay(opened):
    page = opened("steps", "#head=1.2&step=2")
    assert page.locator("#step").get_attribute("aria-valuetext") == "step 200"
    folds = page.locator("#panel .direction")
    before = folds.evaluate_all("all => all.map((one) => one.open)")
    assert before[0]
    assert not before[4]
    for place in (0, 4):
        folds.nth(place).locator("summary").click()
    page.locator("#step").press("ArrowRight")
    assert page.locator("#step").get_attribute("aria-valuetext") == "step 300"
    after = folds.evaluate_all("all => all.map((one) => one.open)")
    assert after == [not before[0], *before[1:4], not before[4], *before[5:]]


def test_a_head_is_jumped_to_by_name(opened):
    page = opened("steps", "#head=0.0&step=2")
    page.locator("#jump").fill(" 1.3 ")
    page.locator("#jump").press("Enter")
    assert heading(page) == "Head 1.3 step 200"
    page.locator("#jump").fill("2.0")
    page.locator("#jump").press("Enter")
    assert heading(page) == "Head 1.3 step 200"
    message = page.locator("#jump-said")
    assert message.inner_text() == "No head “2.0”: layers 0 to 1, heads 0 to 3, written as 0.0"
    page.locator("#grid button").first.click()
    assert message.inner_text() == ""


RGB = """one => {
    const [canvas, style] = [document.createElement("canvas"), getComputedStyle(one)];
    const paint = canvas.getContext("2d", { willReadFrequently: true });
    const ground = (at) => {
        const colour = getComputedStyle(at).backgroundColor;
        return colour === "rgba(0, 0, 0, 0)" ? ground(at.parentElement) : colour;
    };
    return [style.color, ground(one)].map((colour) => {
        paint.fillStyle = colour;
        paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
    }).concat(style.opacity);
}"""


def contrast(element):
    """Of text to what it stands on (WCAG 2.2, relative luminance)."""
    *colours, opacity = element.evaluate(RGB)
    assert float(opacity) == 1
    codes = ["#" + "".join(f"{value:02x}" for value in colour) for colour in colours]
    low, high = sorted(linear_rgb(code) @ [0.2126, 0.7152, 0.0722] + 0.05 for code in codes)
    return high / low


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(opened, scheme):
    page = opened("steps", color_scheme=scheme)
    entries = page.locator("#legend .none")
    assert entries.count() > 0
    assert contrast(entries.first) >= 4.5
    assert contrast(entries.first.locator(".quiet")) >= 4.5
    words = page.locator("#panel .text .token", has_text="the")
    words.first.evaluate("one => one.style.setProperty('--weight', '100%')")
    assert contrast(words.first) >= 4.5
    assert contrast(words.first.locator("i")) >= 4.5
