"""What the chat page makes of what a model writes: Markdown in linear time, and nothing that runs."""

import json
import unittest

import harness
import page_rig as rig
from harness import scale
from page_rig import ANSWERED, MARKDOWN, PageCase, StandIn, chat, connected, send, stream

tearDownModule = rig.stop


def setUpModule():
    if harness.QUICK:
        raise unittest.SkipTest("the browser's doing, not the server's")
    rig.start()


# Lines that begin as one thing and turn out to be another.
TRICKY = """text
---x
text
-- y
text
1. z
1.5 w
#
#x
# heading
text
``` not`a fence
text
>quote
* * x
* * *
text
a|b
-|-x

a|b
-|-
c|d
e
- a

 b
  c
~~~ x
~~
~~~
after"""

ATTACKS = ["<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))",
           "[x](java\tscript:alert(1))", "[x](data:text/html,<script>alert(1)</script>)", "<javascript:alert(1)>",
           "[x](vbscript:x)", "![x](https://example.com/x.png)", "[x](//example.com)", "[x](/v1/models)",
           "[<img src=x onerror=alert(1)>](https://example.com)", "`<svg onload=alert(1)>`", "```<b>\n<i>x</i>\n```",
           "<a href='https://example.com' onclick='alert(1)'>x</a>", "| <b>x</b> | y |\n|---|---|\n| <u>z</u> | w |",
           "# <h1>x</h1>", "> <iframe src=//example.com>", "&lt;b&gt; &#60;b&#62;", "[a](https://a.example \"t\" onclick=x)"]

HOSTILE = ["*a ", "**a ", "_a ", "a*", "a**", "[", "]", "[a](", "[a](b", "![", "`", "``a`", "`a``", "<", "<http://",
           "http://%% ", "http://a", "\\", "> ", ">", "- ", "-", "1. ", "| ", "|", "#", "# ", "~~a", "~~~\n", "```\n", "```a\n",
           "a\n\n", "- a\n\n", "> a\n", "*a_b", "**a*", "***a** ", "*a **b ", " ", "\t", "\n", "|a\n|-\n", "a|b\n-|-\n", "(",
           "[a](b \"", "- - a\n", "  - a\n", "1. a\n   ", "___", "=", "h", "[[a](http://b) ", "[a](http://b)", "`` ` ", " `a",
           "\u2028", "# \u2028"]


class Markdown(PageCase):
    def render(self, text, size=None):
        with StandIn(stream(*([text] if isinstance(text, str) else text), size=size)) as s, rig.browser.page(s.url) as page:
            chat(page, "A")
            self.check_quiet(page)
            return page.js("document.querySelector('.answer').innerHTML"), page

    def test_what_is_rendered(self):
        with StandIn(stream(MARKDOWN)) as s, rig.browser.page(s.url) as page:
            chat(page, "A")
            texts = lambda selector: page.js(f"[...document.querySelectorAll('.answer {selector}')].map(e => e.textContent)")
            self.assertEqual(texts("h3"), ["Title"])
            self.assertEqual(texts("p em"), ["em", "both"])
            self.assertEqual(texts("strong"), ["strong", "both", "words"])
            self.assertEqual(texts("p code"), ["co*de*"])
            self.assertEqual(texts("s"), ["gone"])
            self.assertEqual(texts("> p")[0], "One em and strong and both and co*de* and gone, snake_case_name, 2 * 3 * 4.\n"
                                              "Second line *plain*.")
            self.assertEqual(texts("> ul > li")[::2], ["a", "c"])
            self.assertEqual(texts("> ul > li > ol > li"), ["one", "two"])
            self.assertEqual(texts("> ul > li > p"), ["more of b"])
            self.assertEqual(texts("blockquote li"), ["in a list"])
            self.assertEqual(texts("pre")[0], 'def f():\n\treturn "<b>"\n\n# not a heading')
            self.assertEqual(texts("pre")[1], "open to the end")
            self.assertEqual(texts(".code span"), ["python", "code"])
            self.assertEqual(texts("th"), ["a", "b"])
            self.assertEqual(texts("td"), ["1", "2", "3 | 4"])
            self.assertEqual(page.js("document.querySelectorAll('.answer hr').length"), 1)
            links = page.js("[...document.querySelectorAll('.answer a')].map(a => [a.textContent, a.href, a.rel])")
            self.assertEqual(links, [[t, h, "noopener noreferrer"] for t, h in (
                ("link", "https://example.com/a_(b)?q=1"), ("https://example.com/x", "https://example.com/x"),
                ("https://example.com/y_z", "https://example.com/y_z"), ("me", "mailto:a@example.com"))])
            self.assertTrue(texts("> p")[-1].endswith("Not closed: **a *b `c [d]("))
            self.check_quiet(page)

    def test_attacks_stay_text(self):
        allowed = {"P", "A", "CODE", "PRE", "DIV", "SPAN", "BUTTON", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "H3",
                   "BLOCKQUOTE"}
        with StandIn(*(stream(a) for a in ATTACKS)) as s, rig.browser.page(s.url) as page:
            for n, attack in enumerate(ATTACKS, 1):
                with self.subTest(attack=attack):
                    chat(page, attack, n)
                    node = f"document.querySelector('.turn:nth-child({n})')"
                    self.assertLessEqual(set(page.js(f"[...{node}.querySelectorAll('.answer *')].map(e => e.tagName)")), allowed)
                    for href in page.js(f"[...{node}.querySelectorAll('.answer a')].map(e => e.href)"):
                        self.assertRegex(href, r"^https://")
                    for part in ("alert(1)", "<b>", "&lt;", "iframe"):
                        if part in attack:
                            self.assertIn(part, page.js(f"{node}.querySelector('.answer').textContent"))
            self.assertEqual([u for u in page.requested() if "example" in u], [])
            self.check_quiet(page)

    def test_streamed_is_whole(self):
        whole, _ = self.render(MARKDOWN)
        for pieces in ([c for c in MARKDOWN], [MARKDOWN[i:i + 7] for i in range(0, len(MARKDOWN), 7)]):
            self.assertEqual(self.render(pieces)[0], whole)
        text = "Größe 😀 名前 — *ü*"
        self.assertEqual(self.render([text], size=1)[0], self.render(text)[0])

    def test_drawn_at_any_time(self):
        """However the frames fall, what is seen in the end is the same, and a block that is over is not drawn again."""
        draw = """((pieces, made = 0) => {
            const node = document.createElement("div"), view = new AnswerView(node, true), make = document.createElement;
            document.createElement = function (tag) { made++; return make.call(this, tag); };
            for (const piece of pieces) { view.rest += piece; view.draw(); }
            delete document.createElement;
            return [node.innerHTML, made, node.querySelectorAll("*").length];
        })"""
        with StandIn() as s, rig.browser.page(s.url) as page:
            for text in (MARKDOWN, TRICKY):
                whole = page.js(f"{draw}([{json.dumps(text)}])")[0]
                self.assertEqual(page.js(f"{draw}([...{json.dumps(text)}])")[0], whole)
            text, made, elements = page.js(draw + "(" + json.dumps(["One *paragraph*.\n\n"] * 300) + ")")
            self.assertEqual(elements, 600)
            self.assertLess(made, 3 * elements)

    def test_copy(self):
        with StandIn(stream("```\nsome\n  code\n```")) as s:
            # The clipboard of a headless browser is not everywhere; what is put there is looked at.
            catch = "navigator.clipboard.writeText = async text => { window.copied = text; };"
            with rig.browser.page(s.url, before=catch) as page:
                chat(page, "A")
                page.click(".code button")
                page.wait("window.copied === 'some\\n  code' && document.querySelector('.code button').textContent === 'Copied'")

    def test_hostile_text_takes_linear_time(self):
        """Eight times the text takes about eight times the work, whatever it is made of, and nests no deeper than it may."""
        n = 5000
        units = [*HOSTILE, " ".join("`" * i for i in range(1, 100)), " ".join("*_"[i % 2] * i for i in range(1, 100))]
        with StandIn() as s, rig.browser.page(s.url) as page:
            page.js("window.render = text => { const node = document.createElement('div');"
                    " appendBlocks(node, text.split('\\n'), 0); return node; }")

            def work(unit, m):
                before = page.cpu_seconds()
                page.js(f"render({json.dumps(unit)}.repeat({m // len(unit) + 1})) && 0")
                return page.cpu_seconds() - before
            for unit in units:
                with self.subTest(unit=unit[:20]):
                    once, eight = (min(work(unit, m) for _ in range(2)) for m in (n, 8 * n))
                    self.assertLess(eight, 20 * once + 0.1, "eight times the text")

    def test_nesting_is_bounded(self):
        depth = """(text => {
            const node = document.createElement("div");
            appendBlocks(node, text.split("\\n"), 0);
            const above = e => e === node ? 0 : 1 + above(e.parentElement);
            return Math.max(...[...node.querySelectorAll("*")].map(above));
        })"""
        deep = {"emphasis": "*a **b " * 3000 + "b** a* " * 3000, "quotes": "> " * 3000 + "x", "lists": "- " * 3000 + "x",
                "both": "> - " * 3000 + "x"}
        with StandIn() as s, rig.browser.page(s.url) as page:
            for name, text in deep.items():
                with self.subTest(name=name):
                    found = page.js(depth + "(" + json.dumps(text) + ")")
                    self.assertGreater(found, 8)
                    self.assertLess(found, 60)

    def test_long_answer(self):
        words = "The quick brown fox jumps over the **lazy** dog. "
        paragraphs = scale(4000, 800)
        pieces = [words * 2 + "\n\n" if i % 3 else words for i in range(paragraphs)]
        with StandIn(stream(*pieces)) as s, rig.browser.page(s.url) as page:
            connected(page)
            page.js("window.made = 0; { const f = document.createElement.bind(document);"
                    " document.createElement = tag => { made++; return f(tag); }; }")
            send(page, "A")
            page.wait(ANSWERED.format(1), 60)
            elements = page.js("document.querySelectorAll('.answer *').length")
            self.assertGreater(elements, paragraphs)
            self.assertLess(page.js("made"), 3 * elements, "blocks are drawn again and again")
            self.assertLess(page.js("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight"), 50)


class Policy(PageCase):
    def test_nothing_else_runs(self):
        with StandIn() as s, StandIn() as other, rig.browser.page(s.url) as page:
            connected(page)
            tried = "(() => { try { document.body.innerHTML = '<p>x'; return 'set'; } catch { return 'no'; } })()"
            self.assertEqual(page.js(tried), "no")
            page.js("document.body.append(Object.assign(document.createElement('img'), {src: 'https://example.com/x.png'}))")
            page.js("(() => { const e = document.createElement('p'); try { e.setAttribute('onclick', 'window.ran = 1'); } catch {}"
                    " document.body.append(e); e.click(); })()")
            page.js("(() => { const e = document.createElement('script'); try { e.append('window.ran = 1'); } catch {}"
                    " document.body.append(e); })()")
            self.assertIsNone(page.js("window.ran ?? null"))
            self.assertEqual(page.js(f"fetch('{other.url}', {{mode: 'no-cors'}}).then(() => 'sent', () => 'no')"), "no")
            self.assertEqual(page.js("fetch('v1/models').then(r => r.status)"), 200)
            for part in ("img-src", "connect-src", "TrustedScript", "TrustedHTML"):  # the browser says what it stopped
                self.assertTrue(any(part in problem for problem in page.problems()), (part, page.problems()))


if __name__ == "__main__":
    unittest.main()
