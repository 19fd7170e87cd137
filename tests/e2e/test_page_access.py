"""The chat page for every eye and hand: dark and light, small screens, the keyboard, screen readers."""

import threading
import unittest

import harness
import page_rig as rig
from browser import SHIFT
from page_rig import ANSWERED, MARKDOWN, PageCase, StandIn, chat, connected, error, send, stream

tearDownModule = rig.stop


def setUpModule():
    if harness.QUICK:
        raise unittest.SkipTest("the browser's doing, not the server's")
    rig.start()


CONTRAST = """(() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const rgba = color => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const color = rgba(getComputedStyle(e).backgroundColor);
            if (color[3] === 255) return color;
        }
        return [255, 255, 255];
    };
    const found = [];
    for (const e of document.querySelectorAll("body *")) {
        const says = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.placeholder;
        if (!says || !e.checkVisibility() || e.disabled || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
        const a = luminance(rgba(getComputedStyle(e, e.placeholder ? "::placeholder" : null).color)), b = luminance(behind(e));
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        found.push([ratio, e.tagName + "." + e.className + " " + e.textContent.slice(0, 30)]);
    }
    return found;
})()"""


class Looks(PageCase):
    def test_dark_and_light(self):
        background = "getComputedStyle(document.body).backgroundColor"
        with StandIn() as s, rig.browser.page(s.url, scheme="light") as page:
            light = page.js(background)
            page.scheme("dark")
            dark = page.js(background)
            self.assertNotEqual(light, dark)
            for expected in (light, dark, dark):  # the button: light, dark, as the system
                page.click("#theme")
                self.assertEqual(page.js(background), expected, page.text("#theme"))
            page.click("#theme")
            page.go(s.url)
            self.assertEqual(page.js(background), light)
            self.assertEqual(page.text("#theme"), "Theme: light")

    def test_contrast(self):
        for scheme in ("light", "dark"):
            with StandIn(stream(MARKDOWN), error(500)) as s, rig.browser.page(s.url, scheme=scheme) as page:
                chat(page, "A")
                send(page, "B")
                page.wait("!!document.querySelector('.failure')")
                page.js("togglePanel(true); askKey(); note('x'); beginEdit(turns[1])")
                found = page.js(CONTRAST)
                self.assertGreater(len(found), 60)
                self.assertEqual([f for f in found if f[0] < 4.5], [], scheme)

    def test_phone(self):
        with StandIn(stream(MARKDOWN + "\n~~~\n" + "x" * 500)) as s, rig.browser.page(s.url, width=360, height=640) as page:
            chat(page, "A" * 300)
            wide = "document.documentElement.scrollWidth > innerWidth || scroller.scrollWidth > scroller.clientWidth"
            self.assertFalse(page.js(wide))
            page.click("#toggle")
            self.assertTrue(page.js("document.getElementById('settings').getBoundingClientRect().width === innerWidth"))
            self.assertFalse(page.js("document.documentElement.scrollWidth > innerWidth"))
            page.press("Escape")
            self.assertFalse(page.js("document.getElementById('settings').checkVisibility()"))

    def test_motion(self):
        hold = threading.Event()
        running = "document.getAnimations().filter(a => a.playState === 'running').length"
        with StandIn(stream("a", "b", "c", hold=hold)) as s, rig.browser.page(s.url) as page:
            connected(page)
            send(page, "A")
            page.wait(running)
            page.scheme("light", motion="reduce")
            self.assertEqual(page.js(running), 0)
            hold.set()


class Access(PageCase):
    def test_keyboard(self):
        message = "document.getElementById('message')"
        with StandIn(stream("one"), stream("two", "x", "y", hold=threading.Event())) as s, rig.browser.page(s.url) as page:
            connected(page)
            self.assertEqual(page.js("document.activeElement.id"), "message")
            page.type("a")
            page.press("Enter", SHIFT)
            page.type("b")
            self.assertEqual(page.js(message + ".value"), "a\nb")
            self.assertEqual(s.requests, [])
            page.press("Enter")
            page.wait(ANSWERED.format(1))
            self.assertEqual(s.body()["messages"][0]["content"], "a\nb")
            self.assertEqual(page.js(message + ".value"), "")
            self.assertEqual(page.js("document.activeElement.id"), "message")
            send(page, "c")
            page.wait("document.querySelectorAll('.answer')[1]?.innerText")
            page.press("Escape")
            page.wait(ANSWERED.format(2))

    def test_tab_order(self):
        with StandIn(stream("one")) as s, rig.browser.page(s.url) as page:
            chat(page, "A")
            page.js("togglePanel(false); document.activeElement.blur(); window.getSelection().removeAllRanges()")
            page.js("document.body.tabIndex = -1; document.body.focus()")
            seen = []
            for _ in range(9):
                page.press("Tab")
                seen.append(page.js("document.activeElement.id || document.activeElement.textContent"))
                self.assertNotEqual(page.js("getComputedStyle(document.activeElement).outlineStyle"), "none", seen)
            self.assertEqual(seen, ["Skip to the message box", "new", "theme", "toggle", "scroller", "Edit", "Copy", "Regenerate",
                                    "message"])
            page.js("document.body.focus()")
            page.press("Tab")
            page.press("Enter")
            self.assertEqual(page.js("document.activeElement.id"), "message")

    def test_names(self):
        controls = {"button", "textbox", "spinbutton", "radio", "combobox", "link", "searchbox"}
        with StandIn(stream(MARKDOWN), models=("a", "b")) as s, rig.browser.page(s.url) as page:
            chat(page, "A")
            page.js("togglePanel(true); askKey()")
            nodes = page.accessibility()
            named = [(role, name) for role, name, _ in nodes if role in controls]
            self.assertEqual([n for n in named if not n[1].strip()], [])
            self.assertEqual(sum(role == "spinbutton" for role, _ in named), 8)
            names = {name for _, name in named}
            for name in ("Message", "Send", "Temperature", "System prompt", "API key", "Model", "Copy the code", "Settings",
                         "New chat", "Regenerate"):
                self.assertIn(name, names)
            # A placeholder is no label: it goes when something is typed.
            unlabelled = page.js("[...document.querySelectorAll('input, select, textarea')]"
                                 ".filter(e => !e.labels.length && !e.ariaLabel).map(e => e.id)")
            self.assertEqual(unlabelled, [])
            roles = [(role, name) for role, name, _ in nodes]
            for landmark in (("banner", ""), ("main", ""), ("complementary", "Settings"), ("region", "Conversation")):
                self.assertIn(landmark, roles)

    def test_announced_once(self):
        """What is read aloud is the finished answer, not each token."""
        watch = """window.said = []; new MutationObserver(() => said.push(document.getElementById("status").textContent))
                   .observe(document.getElementById("status"), {childList: true, characterData: true, subtree: true})"""
        with StandIn(stream(*"abcdefgh")) as s, rig.browser.page(s.url) as page:
            page.js(watch)
            chat(page, "A")
            page.wait("said.length")
            self.assertEqual(page.js("said"), ["Answer: abcdefgh"])
            live = page.js("[...document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]')].map(e => e.id)")
            self.assertEqual(live, ["status"])


if __name__ == "__main__":
    unittest.main()
