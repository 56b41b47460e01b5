"""Metadata that says what a page needs is checked; the roadmap and the reader's ticks follow it."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import expect

from site_build.options import read_mkdocs_yml
from tests.browser import watched
from theme import layered, lessons, picture, roadmap

ROOT = Path(__file__).parents[2]
CELL = "```python\nimport math\nassert math.pi > 3\n```\n"
META = {"title": "A", "minutes": 1, "prerequisites": [], "able": ["do it"]}
WORDS = "word " * 180
KEY = "forward-pass.read"


# Metadata


def write(folder: Path, stem: str, body: str = CELL + WORDS, **meta) -> None:
    path = folder / f"{stem}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in (META | meta).items() if value is not None}
    path.write_text(f"---\n{yaml.safe_dump(kept)}---\n# A\n\n{body}\n")


@pytest.fixture
def three(tmp_path):
    """Lessons a, b, c, each needing the one before; and an index."""
    write(tmp_path, "t/index", "Words.")
    for before, stem in zip([None, "t/a", "t/b"], ["t/a", "t/b", "t/c"], strict=True):
        write(tmp_path, stem, title=stem[-1].upper(), prerequisites=[before] if before else [])
    return tmp_path


ORDER = ["t/index", "t/a", "t/b", "t/c"]


def test_right_metadata_is_no_fault(three):
    found, faults = lessons.read(three, ORDER)
    assert faults == [] and list(found) == ORDER[1:]
    assert found["t/c"].needs == ("t/b",) and found["t/c"].topic == "t"


@pytest.mark.parametrize(
    "meta, said",
    [
        ({"minutes": None}, "the metadata has no minutes"),
        ({"able": None}, "the metadata has no able"),
        ({"able": []}, "the metadata has no able"),
        ({"prerequisites": None}, "the metadata has no prerequisites"),
        ({"prerequisites": ["t/x"]}, "prerequisites: there is no page t/x"),
        ({"prerequisites": ["t/c"]}, "prerequisites: t/c comes later in the navigation"),
        ({"prerequisites": ["t/b"]}, "prerequisites: t/b is the page itself"),
        ({"prerequisites": ["t/index"]}, "prerequisites: t/index is no lesson"),
        ({"minutes": 4}, "4 minutes, but its words and cells are worth 2"),
    ],
)
def test_wrong_metadata_is_said_with_the_page(three, meta, said):
    write(three, "t/b", **meta)
    faults = lessons.read(three, ORDER)[1]
    assert faults[-1].startswith(f"t/b.md: {said}"), faults
    assert len(faults) == 1 + ("later" in said)  # what comes later goes in a circle here


def test_a_circle_is_said_whole(three):
    write(three, "t/a", prerequisites=["t/c"])
    faults = lessons.read(three, ORDER)[1]
    (circle,) = [fault for fault in faults if "circle" in fault]
    assert {"t/a", "t/b", "t/c"} <= set(re.findall(r"t/\w", circle.partition("circle")[2]))
    assert "t/a.md: prerequisites: t/c comes later in the navigation" in faults


def test_minutes_count_words_and_shown_cells_only(three):
    def counted(body):
        write(three, "t/a", body)
        return lessons.minutes(lessons.read_page(three, "t/a.md"))

    plain = counted(CELL)
    assert counted(CELL + WORDS) == pytest.approx(plain + 1, abs=0.02)
    assert counted(CELL * 2) == pytest.approx(plain + lessons.MINUTES_A_CELL, abs=0.02)
    hidden = CELL.replace("python", "python hide=all")
    assert counted(CELL + hidden) == pytest.approx(plain, abs=0.02)
    unread = f"```text\n{WORDS}\n```\n<!-- {WORDS} -->\n"
    assert counted(CELL + unread) == pytest.approx(plain, abs=0.02)


def test_the_build_fails_with_the_page_and_what_was_wrong(shell):
    with (shell.root / "mkdocs.yml").open("a") as file:
        pages = "index.md, topic/a.md, topic/b.md, reference/tags.md, API: reference/api/index.md"
        file.write(f"nav: [{pages}]\n")
    write(shell.root / "site_src", "topic/a", title="First")
    write(shell.root / "site_src", "topic/b", title="Second", prerequisites=["topic/a"])
    code, output = shell.build()
    assert code == 0, output
    second = shell.html("topic/b.html")
    assert re.search(r'You need</strong> <a href="a.html">First</a>', second)
    assert "You will be able to</strong> do it." in second
    assert '<dt>Builds on</dt><dd><a href="a.html">First</a></dd>' in second
    assert '<dt>Leads to</dt><dd><a href="b.html">Second</a></dd>' in shell.html("topic/a.html")
    assert "road-tick" in second and "road-tick" not in shell.html("index.html")
    write(shell.root / "site_src", "topic/a", prerequisites=["topic/b"])
    code, output = shell.build()
    assert code == 1
    assert "topic/a.md: prerequisites: topic/b comes later in the navigation" in output


# The graph


@pytest.fixture(scope="module")
def real() -> dict[str, lessons.Lesson]:
    folder, _, order = read_mkdocs_yml(ROOT / "mkdocs.yml")
    found, faults = lessons.read(folder, order)
    assert not faults and len(found) > 50
    return found


def test_what_the_metadata_says_is_not_said_again(real):
    for lesson in real.values():
        text = (ROOT / "site_src" / lesson.source).read_text("utf-8")
        assert not re.search(r"After (this page|it),? you (can|will be able)", text), lesson.source
        assert not re.search(r"\b(allow|[Aa]bout) \d+\s+minutes", text), lesson.source


def test_a_path_is_what_the_goals_need_without_what_is_known(real):
    def brute(stem):
        return {stem}.union(*(brute(need) for need in real[stem].needs))

    for goal, known in itertools.product(["models/llama", "peft/comparison"], real):
        steps = [lesson.stem for lesson in lessons.path(real, [goal], [known])]
        assert set(steps) == brute(goal) - brute(known)
        assert steps == [stem for stem in real if stem in steps]


def test_only_pairs_that_follow_from_others_are_left_out(real):
    direct = lessons.direct(real)
    needs = {stem: {a for a, b in direct if b == stem} for stem in real}

    def reached(stem):
        return needs[stem].union(*(reached(need) for need in needs[stem]))

    for stem, lesson in real.items():
        assert reached(stem) == lessons.closure(real, lesson.needs)
        assert not any(a in reached(b) for a in needs[stem] for b in needs[stem])


def test_what_is_alike_shares_tags_and_is_no_neighbour(real):
    for stem, lesson in real.items():
        found = lessons.alike(real, stem)
        assert len(found) <= 3
        near = {stem, *lesson.needs} | {one.stem for one in lessons.leads_to(real, stem)}
        for one in found:
            assert one.tags & lesson.tags and one.stem not in near
        if lesson.tags and not found:
            shared = [s for s, one in real.items() if one.tags & lesson.tags]
            assert set(shared) <= near


# The picture


def check(rows, edges, widths, across, spots):
    for number in range(len(rows)):
        row = sorted((s for s in spots.values() if s.row == number), key=lambda s: s.x)
        for left, right in itertools.pairwise(row):
            assert right.x - left.x >= layered.apart(left, right) - 1e-6
        assert row[0].x >= row[0].width / 2 - 1e-6
        assert row[-1].x <= across - row[-1].width / 2 + 1e-6
    at = {node: number for number, row in enumerate(rows) for node in row}
    tops = [62.0 * number for number in range(len(rows))]
    for a, b in edges:
        drawn = layered.line(a, b, spots, tops, 40)
        assert drawn.startswith(f"M{spots[a, at[a]].x:.0f} {tops[at[a]] + 40:.0f}C")
        assert drawn.endswith(f"{spots[b, at[b]].x:.0f} {tops[at[b]]:.0f}")
        assert drawn.count("V") == at[b] - at[a] - 1  # straight through each row between


@pytest.mark.parametrize("seed", range(5))
def test_boxes_and_lines_keep_apart(seed):
    chance = random.Random(seed)
    rows = [[f"{r}.{n}" for n in range(chance.randint(1, 5))] for r in range(7)]
    nodes = [(r, node) for r, row in enumerate(rows) for node in row]
    pairs = [(a, b) for (r, a), (s, b) in itertools.product(nodes, nodes) if r < s]
    edges = chance.sample(pairs, 20)
    widths = {node: chance.uniform(60, 150) for _, node in nodes}
    check(rows, edges, widths, 1200, layered.place(rows, edges, widths, 1200))


def test_the_sweeps_take_crossings_away():
    rows = [list("abcdef"), list("ABCDEF")]
    edges = [(a, b) for a, b in zip("abcdef", "FEDCBA", strict=True)]
    spots = layered.place(rows, edges, dict.fromkeys("abcdefABCDEF", 20.0), 600)
    above = sorted("abcdef", key=lambda n: spots[n, 0].x)
    below = sorted("ABCDEF", key=lambda n: spots[n, 1].x)
    assert [dict(edges)[node] for node in above] == below


def test_rows_of_a_topic_lead_down_and_are_short(real):
    for topic in {lesson.topic for lesson in real.values()}:
        group = [lesson for lesson in real.values() if lesson.topic == topic]
        rows = picture.rows(group)
        at = {stem: number for number, row in enumerate(rows) for stem in row}
        assert set(at) == {lesson.stem for lesson in group}
        assert max(map(len, rows)) <= picture.MOST
        assert all(at[n] < at[one.stem] for one in group for n in one.needs if n in at)


def links(text: str, block: str) -> set[str]:
    """The addresses in the first block of a class, up to the next block of the roadmap."""
    inside = re.split(r'<div class="road|<h2', text.partition(f'class="{block}"')[2])[0]
    return set(re.findall(r'href="([^"]+)"', inside))


def test_the_picture_and_the_list_lead_to_every_lesson(site, real):
    text = (site / "reference/roadmap.html").read_text("utf-8")
    wanted = {(site / f"{stem}.html").resolve() for stem in real}
    for block in ("road-picture", "road road-list"):
        found = {(site / "reference" / link).resolve() for link in links(text, block)}
        assert wanted <= found and all(path.is_file() for path in found)


def test_planned_pages_are_shown_and_are_no_pages(site, real):
    plan = yaml.safe_load(roadmap.PLANNED.read_text("utf-8"))
    text = (site / "reference/roadmap.html").read_text("utf-8")
    stems = [f"{topic}/{page}" for topic, about in plan.items() for page in about["pages"]]
    assert stems and roadmap.written(plan, list(real)) == []
    for about in plan.values():
        for name, _ in about["pages"].values():
            assert f"<em>{name}</em>" in text
    assert roadmap.written(plan, [stems[0]]) == [f"theme/planned.yml: {stems[0]} is a page now"]


def test_paths_hold_what_their_goals_need(site, real):
    text = (site / "reference/roadmap.html").read_text("utf-8")
    about = lessons.read_page(ROOT / "site_src", "reference/roadmap.md").meta["paths"]
    blocks = text.split('class="road road-path"')[1:]
    assert len(blocks) == len(about) >= 4
    for block, path in zip(blocks, about.values(), strict=True):
        steps = lessons.path(real, path["goals"], path.get("knows", []))
        assert f"{len(steps)} pages, {roadmap.hours(sum(one.minutes for one in steps))}" in block
        shown = re.findall(r'<li><a href="\.\./([^"]+)\.html"', block.partition("</ol>")[0])
        assert shown == [one.stem for one in steps]


# The reader's ticks


@pytest.fixture(params=["http", "file"])
def reader(request, browser, site, address):
    """A tab on the site, from a server and from disk, and the address of a page."""
    base = address if request.param == "http" else f"{site.as_uri()}/"
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    tab, troubles = watched(context, base)
    tab.at = lambda stem: tab.goto(f"{base}{stem}.html")
    tab.kept = lambda: json.loads(tab.evaluate("key => localStorage.getItem(key)", KEY) or "{}")
    yield tab
    context.close()
    assert not troubles, "\n".join(troubles)


def keep(tab, **read):
    tab.evaluate("([key, read]) => localStorage.setItem(key, read)", [KEY, json.dumps(read)])
    tab.reload()


LLAMA = {"models/llama": "2026-01-02"}


def test_a_tick_stays_and_shows_in_navigation_and_roadmap(reader, real):
    tab = reader
    tab.at("attention/gqa")
    tab.get_by_label("I have read this page").check()
    tab.reload()
    expect(tab.get_by_label("I have read this page")).to_be_checked()
    tab.at("attention/mla")
    expect(tab.get_by_label("I have read this page")).not_to_be_checked()
    link = tab.locator('.md-nav--primary a.md-nav__link[href="gqa.html"]')
    expect(link).to_have_text(re.compile(r"Grouped-query attention\s+\(read\)"))
    expect(tab.locator(".md-nav--primary .road-mark")).to_have_count(1)
    tab.at("reference/roadmap")
    total = sum(lesson.minutes for lesson in real.values()) - real["attention/gqa"].minutes
    said = f"You have read 1 of {len(real)} lessons; the others take {roadmap.hours(total)}."
    expect(tab.locator("#road-progress")).to_have_text(said)
    first = tab.locator(".road-path").first
    expect(first.locator("li .road-mark")).to_have_count(1)
    expect(first.locator(".road-left")).to_contain_text("1 read")
    expect(tab.locator(".road-picture a.read")).to_have_count(1)
    expect(tab.locator(".road-picture a.read title")).to_contain_text("(read)")
    tab.at("attention/gqa")
    tab.get_by_label("I have read this page").uncheck()
    expect(tab.locator(".road-mark")).to_have_count(0)
    assert tab.kept() == {}


def test_a_saved_file_brings_back_what_was_forgotten(reader, tmp_path):
    tab = reader
    tab.at("reference/roadmap")
    expect(tab.locator("#road-forget")).to_be_disabled()
    before = {"attention/gqa": "2026-01-02", "models/llama": "2025-12-31"}
    keep(tab, **before)
    with tab.expect_download() as started:
        tab.get_by_role("button", name="Save my progress as a file").click()
    file = tmp_path / started.value.suggested_filename
    started.value.save_as(file)
    expect(tab.locator("#road-said")).to_have_text("Saved: 2 pages.")
    tab.once("dialog", lambda dialog: dialog.dismiss())
    tab.get_by_role("button", name="Forget everything").click()
    assert tab.kept() == before
    tab.once("dialog", lambda dialog: dialog.accept())
    tab.get_by_role("button", name="Forget everything").click()
    assert tab.kept() == {}
    expect(tab.locator(".road-mark")).to_have_count(0)
    tab.get_by_label("Load a saved file").set_input_files(file)
    expect(tab.locator("#road-said")).to_have_text("Loaded: 2 pages.")
    assert tab.kept() == before
    expect(tab.locator(".road-picture a.read")).to_have_count(2)


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "it is not JSON"),
        ("[]", "it is no progress saved here"),
        ({"kind": "other", "version": 1, "read": LLAMA}, "it is no progress saved here"),
        ({"version": 2, "read": LLAMA}, "its version is 2, and 1 is known here"),
        ({"read": ["models/llama"]}, "it has no list of pages"),
        ({"read": {"models/gpt2": True}}, "models/gpt2 has true where a day should be"),
        ({"read": {"models/gpt2": "2026-13-01"}}, 'models/gpt2 has "2026-13-01" where a day'),
        (" " * 1_000_001, "it is larger than such a file can be"),
    ],
)
def test_a_bad_file_is_refused_in_words(browser, address, tmp_path, content, said):
    tab = browser.new_page()
    tab.goto(f"{address}reference/roadmap.html")
    keep(tab, **LLAMA)
    if isinstance(content, dict):
        content = json.dumps({"kind": "forward-pass progress", "version": 1} | content)
    file = tmp_path / "mine.json"
    file.write_text(content)
    tab.get_by_label("Load a saved file").set_input_files(file)
    expect(tab.locator("#road-said")).to_contain_text(f"mine.json was not loaded: {said}")
    assert json.loads(tab.evaluate("key => localStorage.getItem(key)", KEY)) == LLAMA
    tab.close()


def test_pages_that_are_not_here_are_left_out_and_named(browser, address, tmp_path):
    tab = browser.new_page()
    tab.goto(f"{address}reference/roadmap.html")
    read = {"models/gpt2": "2026-01-02", "old/page": "2025-01-02"}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"kind": "forward-pass progress", "version": 1, "read": read}))
    tab.get_by_label("Load a saved file").set_input_files(file)
    words = "Loaded: 1 page. Not here, so left out: old/page."
    expect(tab.locator("#road-said")).to_have_text(words)
    assert list(json.loads(tab.evaluate("key => localStorage.getItem(key)", KEY))) == [
        "models/gpt2"
    ]
    tab.close()


@pytest.mark.parametrize("kept", ["{", "[1]", "null", '{"models/llama": 1}'])
def test_what_is_kept_may_be_nonsense(browser, address, kept):
    context = browser.new_context()
    tab, troubles = watched(context, address)
    tab.goto(f"{address}models/llama.html")
    tab.evaluate("([key, kept]) => localStorage.setItem(key, kept)", [KEY, kept])
    tab.reload()
    expect(tab.get_by_label("I have read this page")).not_to_be_checked()
    tab.get_by_label("I have read this page").check()
    expect(tab.locator(".md-nav--primary .road-mark").first).to_be_attached()
    context.close()
    assert not troubles, troubles


def test_a_browser_that_keeps_nothing_is_told_of(browser, address):
    tab = browser.new_page()
    tab.add_init_script("Storage.prototype.setItem = () => { throw new Error('no') }")
    tab.goto(f"{address}models/llama.html")
    tab.get_by_label("I have read this page").click()
    expect(tab.locator(".road-tick")).to_contain_text("This browser keeps nothing for this site")
    expect(tab.get_by_label("I have read this page")).not_to_be_checked()
    tab.close()


def go(tab, selector: str, most: int = 400) -> None:
    """To an element, by the tab key alone."""
    for _ in range(most):
        tab.keyboard.press("Tab")
        if tab.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{most} tabs don't lead to {selector}")


def test_the_keyboard_alone_does_it_all(browser, address):
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    tab, troubles = watched(context, address)
    tab.goto(f"{address}reference/your_checkpoint.html")
    go(tab, ".road-tick input")
    tab.keyboard.press("Space")
    expect(tab.locator(".road-tick input")).to_be_checked()
    tab.goto(f"{address}reference/roadmap.html")
    go(tab, "#road-goal")
    before = tab.locator("#road-steps").inner_text()
    tab.keyboard.press("Home")
    expect(tab.locator("#road-steps")).not_to_have_text(before)
    go(tab, "#road-export")
    with tab.expect_download():
        tab.keyboard.press("Enter")
    go(tab, "#road-import")
    chosen = []
    tab.on("filechooser", lambda chooser: chosen.append(chooser))
    for _ in range(10):  # the browser is told of the listener in its own time
        tab.keyboard.press("Enter")
        tab.wait_for_timeout(500)
        if chosen:
            break
    assert chosen
    tab.once("dialog", lambda dialog: dialog.accept())
    go(tab, "#road-forget")
    tab.keyboard.press("Enter")
    expect(tab.locator("#road-progress")).to_contain_text("You have read 0 of")
    go(tab, '.road-picture a[href="../attention/gqa.html"]')
    expect(tab.locator(".road-picture a.on")).not_to_have_count(0)
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/attention/gqa.html")
    context.close()
    assert not troubles, troubles


def test_a_path_of_ones_own_is_what_python_computes(browser, address, real):
    tab = browser.new_page()
    tab.goto(f"{address}reference/roadmap.html")
    chance = random.Random(0)
    for _ in range(40):
        goal, known = chance.choice(list(real)), chance.choice(["", *real])
        tab.select_option("#road-goal", goal)
        tab.select_option("#road-known", known)
        steps = lessons.path(real, [goal], [known] if known else [])
        shown = tab.locator("#road-steps a").evaluate_all("links => links.map(a => a.href)")
        assert shown == [f"{address}{one.stem}.html" for one in steps]
        said = tab.locator("#road-path-said").inner_text()
        total = roadmap.hours(sum(one.minutes for one in steps))
        assert said.endswith(total) if steps else said == "You know all of that already."
    tab.close()


def test_a_lesson_shows_what_it_needs_in_the_picture(browser, address, real):
    tab = browser.new_page(viewport={"width": 1440, "height": 900})
    tab.goto(f"{address}reference/roadmap.html")
    tab.locator('.road-picture a[href="../models/llama.html"]').hover()
    needed = lessons.closure(real, ["models/llama"])
    shown = tab.locator(".road-picture a.on").evaluate_all(
        "links => links.map(a => a.getAttribute('href'))"
    )
    assert set(shown) == {f"../{stem}.html" for stem in needed}
    count = sum({a, b} <= needed for a, b in lessons.direct(real))
    expect(tab.locator(".road-picture path.on")).to_have_count(count)
    tab.mouse.move(0, 0)
    expect(tab.locator(".road-picture .on")).to_have_count(0)
    tab.close()


def test_a_phone_has_a_list_and_no_script_has_the_paths(browser, address):
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto(f"{address}reference/roadmap.html")
    expect(tab.locator(".road-picture")).to_be_hidden()
    expect(tab.locator(".road-list")).to_be_visible()
    tab.set_viewport_size({"width": 1280, "height": 900})
    expect(tab.locator(".road-picture")).to_be_visible()
    expect(tab.locator(".road-list")).to_be_hidden()
    tab.close()
    tab = browser.new_page(java_script_enabled=False)
    tab.goto(f"{address}reference/roadmap.html")
    assert tab.locator(".road-path li a").count() > 30
    expect(tab.locator(".road-picture")).to_be_visible()
    for own in tab.locator(".road-own").all():
        expect(own).to_be_hidden()
    tab.goto(f"{address}models/llama.html")
    expect(tab.locator(".road-tick")).to_be_hidden()
    tab.close()
