"""The explorer: what is gathered is what the runs say; the page is one file; in a real browser it
shows what it should."""

import base64
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lib import data, paths, runs
from lib.data import phantom
from lib.explore import explorer
from lib.features import extract
from lib.images import SYMMETRIES
from tests import finished

LABEL = "synthetic phantom, 72 images"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Images, metadata and both finished runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_DATA_DIR", str(tmp_path_factory.mktemp("explorer")))
        finished.make(epochs=3)
        images, metadata = data.load(paths.dataset_dir(finished.DATASET))
        folders = {arm: paths.run_dir(finished.DATASET, arm, 0) for arm in ("alexnet", "p4m")}
        return np.array(images), metadata, {arm: runs.load_run(f) for arm, f in folders.items()}


@pytest.fixture(scope="module")
def content(study):
    return explorer.gather(*study, LABEL, phantom.ATTRIBUTION)


def payload(page):
    """The data in a page."""
    data_of = r'<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(data_of, page, re.DOTALL)[1])


def test_what_is_gathered_is_what_the_runs_say(study, content):
    images, metadata, found = study
    assert content["ids"] == metadata["image_id"].tolist()
    assert content["total"] == len(content["ids"]) == 72
    named = [[content["finding_names"][k] for k in f] for f in content["findings"]]
    texts = metadata["findings"].str.replace("No Finding", "").str.replace("_", " ")
    assert [set(names) for names in named] == [set(text.split("|")) - {""} for text in texts]
    for arm in content["arms"]:
        run = found[arm["name"]]
        assert arm["epochs"][-1] == arm["turned"][0] == run.final_assignments.tolist()
        for shown, stored in zip(arm["epochs"][:-1], run.assignments.tolist(), strict=True):
            pairs = set(zip(shown, stored, strict=True))
            assert len(pairs) == len(set(stored)), "other numbers, the same clusters"
        for g in (1, 6):
            turned = np.rot90(images[:, :, ::-1] if g >= 4 else images, g % 4, (1, 2))
            features = extract(runs.load_model(run), turned)
            assert arm["turned"][g] == runs.assign(run, features).tolist()
        embedding, labels = runs.embed(run, np.asarray(run.features)), run.final_assignments
        means = np.stack([embedding[labels == k].mean(axis=0) for k in range(4)])[labels]
        away = np.linalg.norm(embedding - means, axis=1)
        np.testing.assert_allclose(np.array(arm["distance"][-1]) / 1000, away, atol=6e-4)
        assert np.abs([arm["x"], arm["y"]]).max() == pytest.approx(1, abs=1e-3)
    alexnet, p4m = content["arms"]
    assert all(line == p4m["turned"][0] for line in p4m["turned"]), "P4M has these symmetries"
    assert any(line != alexnet["turned"][0] for line in alexnet["turned"])
    assert len(content["turns"]) == len(SYMMETRIES)


def test_a_part_of_the_images_can_be_shown(study):
    images, metadata, found = study
    some = explorer.gather(images, metadata, {"p4m": found["p4m"]}, LABEL, "x", n_images=20)
    rows = np.flatnonzero(metadata["image_id"].isin(some["ids"]))
    assert (len(rows), some["total"]) == (20, 72)
    assert some["ids"] == metadata["image_id"][rows].tolist()
    assert some["arms"][0]["epochs"][-1] == found["p4m"].final_assignments[rows].tolist()
    assert (some["pixels"] == images[rows]).all()


def test_errors_quote(study):
    images, metadata, found = study
    for given, n, quoted in (({}, 9, "no run"), (found, 3, "got 3"), (found, 9, "72 images")):
        with pytest.raises(ValueError, match=quoted):
            explorer.gather(images[1:], metadata, given, LABEL, "x", n)


def test_the_sheet_holds_every_image(content):
    page = payload(explorer.html(content))
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(page["sprite"]))))
    tiles = sheet.reshape(-1, 64, page["columns"], 64).swapaxes(1, 2).reshape(-1, 64, 64)[:72]
    assert np.abs(tiles.astype(int) - content["pixels"]).mean(axis=(1, 2)).max() < 4


def test_the_page_is_one_file_with_notice_and_attribution(content, tmp_path, monkeypatch):
    path = explorer.save(content, tmp_path / "explorer.html")
    text = path.read_text(encoding="utf-8")
    outside = re.sub(r"<script\b.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)=["'](?!data:)|url\((?!var)|@import""", outside)
    assert not re.search(r"<script[^>]+src=", text)
    assert "Not for clinical use." in outside
    assert payload(text)["attribution"] == phantom.ATTRIBUTION
    assert "{{" not in outside
    assert str(tmp_path) not in text
    monkeypatch.setattr(explorer, "MOST_BYTES", 1000)
    with pytest.warns(UserWarning, match="lower n_images"):
        explorer.save(content, path)


def test_names_in_the_data_cannot_become_markup(content):
    evil = "</script><img src=x onerror=alert(1)><!--"
    page = explorer.html({**content, "ids": [evil, *content["ids"][1:]], "label": evil})
    assert payload(page)["ids"][0] == evil
    assert evil not in page
    assert "<title>Explorer: &lt;/script&gt;" in page


# --- in a browser

PLACE = """([x, y]) => {
  document.getElementById('map').scrollIntoView({block: 'center'});
  const v = [...Bokeh.index].find((v) => v.model === explorer.map);
  const s = v.el.getBoundingClientRect();
  return [s.x + v.frame.x_scale.compute(x), s.y + v.frame.y_scale.compute(y)]; }"""


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the page of some content; nothing may go wrong in it, and nothing leave it."""
    faults, requests = [], []
    page = browser.new_page(viewport={"width": 1360, "height": 900})
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda m: m.type in ("error", "warning") and faults.append(m.text))
    page.on("request", lambda request: requests.append(request.url))

    def go(content):
        page.goto(explorer.save(content, tmp_path / "explorer.html").as_uri())
        page.wait_for_selector("body[data-ready=true]")
        return page

    yield go
    page.close()
    assert faults == []
    assert [url for url in requests if not url.startswith(("file:", "blob:", "data:"))] == []


@pytest.fixture
def page(opened, content):
    return opened(content)


def members(content, arm, epoch, cluster):
    labels = content["arms"][arm]["epochs"][epoch]
    distance = content["arms"][arm]["distance"][epoch]
    return sorted((i for i, c in enumerate(labels) if c == cluster), key=lambda i: (distance[i], i))


def shown(page, gallery):
    images = f"#{gallery} [data-image]"
    return page.eval_on_selector_all(images, "all => all.map((e) => Number(e.dataset.image))")


def points(page, name):
    """A column of the map's points, by image."""
    index, values = (page.evaluate(f"explorer.points.data.{key}") for key in ("index", name))
    return dict(zip(index, values, strict=True))


def test_images_of_which_nothing_is_known(study, opened):
    images, metadata, found = study
    bare = metadata[["image_id"]].assign(patient_id="", findings="")
    content = explorer.gather(images, bare, {"alexnet": found["alexnet"]}, "own images", "mine")
    assert content["arms"][0]["q"] == {}
    page = opened(content)
    for color in ("findings", "view", "patient", "cluster"):
        page.select_option("#color", color)
    assert page.inner_text("#about-findings") == "No findings are known of these images."
    assert "findings not known" in page.inner_text("#facts")


def test_embeddings_are_points_with_pictures_if_there_are_some(study, opened):
    images, metadata, found = study
    answers = {"final_assignments": found["p4m"].final_assignments, "config": found["p4m"].config}
    answers |= {"embedding": np.array(found["p4m"].features), "assignments": np.empty((0, 72), int)}
    runs, notes = {"given": SimpleNamespace(**answers)}, (LABEL, "mine")
    given = explorer.gather(
        answers["embedding"], metadata, runs, *notes, look=lambda rows: (images[rows], rows < 3)
    )
    page = opened(given)
    assert points(page, "picture") == {i: "block" if i < 3 else "none" for i in range(72)}
    for row in (2, 9):
        page.select_option("#cluster", str(answers["final_assignments"][row]))
        for i in shown(page, "nearest"):
            tile = page.locator(f"#nearest [data-image='{i}']")
            assert (given["ids"][i] in tile.inner_text()) == (i >= 3)
        tile.click()
        assert page.locator("#large").is_visible() == (i < 3)
    page.keyboard.press("r")
    assert not page.locator("#turning").is_visible()
    assert page.inner_text("#epoch-name") == "nothing was trained"


def test_any_number_of_own_labels(study, opened):
    images, metadata, found = study
    labels = [f"label {i % 40:02d}|Normal" if i % 3 else "" for i in range(72)]
    own = metadata.assign(findings=labels, view_position="LL")
    content = explorer.gather(images, own, {"p4m": found["p4m"]}, "own images", "mine")
    names = content["finding_names"]
    assert len(names) > 32
    page = opened(content)
    page.select_option("#color", f"f{names.index('label 38')}")
    assert "label 38 (1)" in page.inner_text("#legend")
    assert f"not known ({labels.count('')})" in page.inner_text("#legend")
    page.select_option("#color", "view")
    assert "LL (72)" in page.inner_text("#legend")


def test_the_gallery_shows_the_cluster_from_near_to_far(page, content):
    assert page.inner_text("header").endswith("Not for clinical use.")
    assert phantom.ATTRIBUTION in page.inner_text("footer")
    for cluster in sorted(set(content["arms"][0]["epochs"][-1])):
        page.select_option("#cluster", str(cluster))
        inside = members(content, 0, -1, cluster)
        assert shown(page, "nearest") == inside[:12]
        assert shown(page, "farthest") == inside[12:][::-1][:6]
        assert page.inner_text("#size").startswith(f"{len(inside)} of 72 images shown")
    page.click("#nearest button:nth-child(2)")
    assert content["ids"][inside[1]] in page.inner_text("#facts")
    assert page.evaluate("explorer.state.image") == inside[1]


def test_hover_shows_the_xray_and_a_click_selects_it(page, content):
    arm = content["arms"][0]
    xy = np.stack([arm["x"], arm["y"]], axis=1)
    gap = np.linalg.norm(xy[:, None] - xy, axis=2) + 9 * np.eye(len(xy))
    i = int(np.argmax(gap.min(axis=1)))  # the point that is most alone
    spot = page.evaluate(PLACE, xy[i].tolist())
    page.mouse.move(*spot)
    tip = page.locator(".bk-Tooltip", has_text=content["ids"][i])
    said = tip.locator("div", has_text="cluster").last.inner_text()
    assert f"cluster {arm['epochs'][-1][i]}" in said
    assert f"patient {content['patients'][i]}" in said
    thumb = "e => [getComputedStyle(e).backgroundImage, e.style.backgroundPosition]"
    image, place = tip.locator("[style*=sprite]").evaluate(thumb)
    assert image.startswith('url("blob:')
    assert [float(v) for v in place.replace("px", "").split()] == [-64 * (i % 9), -64 * (i // 9)]
    page.mouse.click(*spot)
    page.wait_for_function(f"explorer.state.image === {i}")
    assert content["ids"][i] in page.inner_text("#facts")
    assert page.evaluate("explorer.state.cluster") == arm["epochs"][-1][i]


def test_the_epoch_slider_and_the_network_recolour_the_map(page, content):
    for number, arm in ((1, content["arms"][1]), (0, content["arms"][0])):
        page.select_option("#arm", str(number))
        assert arm["title"] in page.inner_text("#about-map")
        assert points(page, "x") == dict(enumerate(arm["x"]))
        for epoch in (0, 2, 3):
            page.fill("#epoch", str(epoch + 1))
            assert points(page, "cluster") == dict(enumerate(arm["epochs"][epoch]))
            assert len(set(points(page, "color").values())) == len(set(arm["epochs"][epoch]))
            name = "after the last epoch" if epoch == 3 else f"{epoch + 1} of 3"
            assert page.inner_text("#epoch-name") == name
    cluster = page.evaluate("explorer.state.cluster")
    said = re.findall(r"\d\.\d\d", page.inner_text("#about-stability"))
    expected = [line[cluster] for line in content["arms"][0]["stability"]]
    assert [*map(float, said)][-3:] == pytest.approx(expected[:-1], abs=0.006)
    assert float(said[0]) == expected[-1] == 1


def test_colours_by_finding_view_and_patient_count_right(page, content, study):
    metadata = study[1]
    counts = metadata["findings"].str.get_dummies("|").sum()
    normal, patient = counts.pop("No Finding"), metadata["patient_id"].value_counts()
    name, n = counts.idxmax().replace("_", " "), counts.max()
    assert patient.iloc[0] > 1
    expected = {
        f"f{content['finding_names'].index(name)}": [f"{name} ({n})", f"no {name} ({72 - n})"],
        "view": [f"{view} ({n})" for view, n in metadata["view_position"].value_counts().items()],
        "patient": [f"{patient.index[0]} ({patient.iloc[0]})"],
        "findings": [f"No Finding ({normal})"],
    }
    for color, entries in expected.items():
        page.select_option("#color", color)
        legend = page.inner_text("#legend").replace("\n", " ")
        assert all(entry in legend for entry in entries), legend
    assert len(set(points(page, "color").values())) > 2


def test_findings_are_beside_the_base_rate(page, content, study):
    has = study[1]["findings"].str.get_dummies("|").drop(columns="No Finding") > 0
    cluster = page.evaluate("explorer.state.cluster")
    inside = np.array(content["arms"][0]["epochs"][-1]) == cluster
    cells = "rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
    rows = page.eval_on_selector_all("#findings tbody tr", cells)
    assert len(rows) == has.shape[1]
    for name, here, base, _ratio, q in rows:
        column = has[name.replace(" ", "_")]
        assert here == f"{100 * column[inside].mean():.1f} %"
        assert base == f"{100 * column.mean():.1f} %"
        assert float(q) == content["arms"][0]["q"][cluster][name]


def test_turns_tell_who_keeps_its_cluster(page, content):
    turned = np.array(content["arms"][0]["turned"])
    image = int(np.flatnonzero((turned != turned[0]).any(axis=0))[0])
    page.evaluate(f"explorer.state.image = {image}")
    page.select_option("#arm", "0")
    assert content["ids"][image] in page.inner_text("#facts")
    tiles = page.locator("#turns button").all_inner_texts()
    for arm, name in zip(content["arms"], ("AlexNet", "P4M"), strict=True):
        for tile, turned in zip(tiles, arm["turned"], strict=True):
            kept = turned[image] == arm["turned"][0][image]
            assert f"{name} {'✓' if kept else '✗'} {turned[image]}" in tile
    assert "P4M: kept in 7 of 7" in page.inner_text("#kept")
    before = page.evaluate("document.getElementById('large').toDataURL()")
    page.click("#turns button:nth-child(2)")
    assert page.evaluate("document.getElementById('large').toDataURL()") != before
    assert page.inner_text("#live").startswith("90° left: AlexNet")
    mirror, turn = np.diag([-1, 1]), np.array([[0, 1], [-1, 0]])  # of (x, y), y downward
    for tile, (mirrored, turns) in enumerate(SYMMETRIES, 1):
        thumb = page.locator(f"#turns button:nth-child({tile}) .thumb")
        css = thumb.evaluate("e => new DOMMatrix(getComputedStyle(e).transform).toFloat64Array()")
        a, b, c, d = (css[k] for k in (0, 1, 4, 5))
        expected = np.linalg.matrix_power(turn, turns) @ np.linalg.matrix_power(mirror, mirrored)
        np.testing.assert_allclose([[a, c], [b, d]], expected, atol=1e-6)


def test_the_keyboard_does_what_the_mouse_does(page, content):
    cluster = page.evaluate("explorer.state.cluster")
    inside = members(content, 0, -1, cluster)
    present = sorted(set(content["arms"][1]["epochs"][-1]))
    for key, state, expected in (
        *(("ArrowRight", "image", inside[1]), ("ArrowRight", "image", inside[2])),
        *(("ArrowLeft", "image", inside[1]), ("r", "turn", 1), ("n", "arm", 1)),
    ):
        page.keyboard.press(key)
        assert page.evaluate(f"explorer.state.{state}") == expected
    page.keyboard.press("[")
    assert page.inner_text("#epoch-name") == "3 of 3"
    page.keyboard.press("]")
    now = page.evaluate("explorer.state.cluster")
    page.keyboard.press("c")
    after = present[(present.index(now) + 1) % len(present)]
    assert page.inner_text("#live").startswith(f"Cluster {after}, ")
    page.keyboard.press("C")
    assert page.evaluate("explorer.state.cluster") == now
    nameless = "all => all.filter((e) => !(e.ariaLabel || e.innerText || e.labels?.length)).length"
    assert page.eval_on_selector_all("button, select, input", nameless) == 0
