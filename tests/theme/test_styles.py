"""The site's own styles: one file, which says what the ten said."""

import re

from theme import styles


class Config:
    extra_css = ("assets/katex/katex.min.css", "assets/site.css")


HEAD = """
  <link rel="stylesheet" href="../assets/stylesheets/main.css">
  <link rel="stylesheet" href="../assets/katex/katex.min.css">
  <link rel="preload" href="../assets/font.woff2">
  <link rel="stylesheet" href="../assets/site.css">
"""


def test_a_page_links_one_file_for_all():
    links = re.findall(r'href="([^"]*)"', styles.on_post_page(HEAD, None, Config))
    assert links == ["../assets/stylesheets/main.css", "../assets/all.css", "../assets/font.woff2"]


def test_a_page_without_them_stays_as_it_is():
    page = '<link rel="stylesheet" href="assets/stylesheets/main.css">'
    assert styles.on_post_page(page, None, Config) == page


def test_what_a_style_loads_is_found_from_the_joined_file(tmp_path):
    class Built(Config):
        site_dir = str(tmp_path)

    (tmp_path / "assets/katex").mkdir(parents=True)
    (tmp_path / "assets/katex/katex.min.css").write_text("a{src:url(fonts/x.woff2)}")
    (tmp_path / "assets/site.css").write_text(
        '/* why */\nb{src:url("fonts/y.woff2")}c{background:url("data:image/png,z")}'
    )
    styles.on_post_build(Built)
    joined = (tmp_path / "assets/all.css").read_text()
    assert joined.split() == [
        "a{src:url(katex/fonts/x.woff2)}",
        'b{src:url(fonts/y.woff2)}c{background:url("data:image/png,z")}',
    ]


def test_every_page_of_the_site_has_one(site):
    assert (site / "assets/all.css").stat().st_size > 10_000
    for path in site.glob("*/*.html"):
        page = path.read_text("utf-8")
        assert len(re.findall(r'rel="stylesheet"', page)) == 3, path  # two are the theme's
        assert f'href="../{styles.JOINED}"' in page


def test_the_themes_rules_hold_for_our_tables_and_none_for_all_while_colours_change(site):
    for path in (site / "assets/stylesheets").glob("*.css"):
        text = path.read_text("utf-8")
        assert "[data-md-color-switching]" not in text
        assert text.count("table:not([class])") == 0
    main = next((site / "assets/stylesheets").glob("main.*.css")).read_text("utf-8")
    assert main.count(styles.OURS_TOO) > 10


def test_what_the_script_says_of_the_page_is_said_before_the_text(site):
    page = (site / "attention/gqa.html").read_text("utf-8")
    said = page.index('classList.replace("no-js", "js")')
    assert page.index("__md_scope=") < said < page.index("<body")
