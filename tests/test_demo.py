"""The demo: what it shows without a browser, the folder of a Space, and the page in a real browser."""

import math
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from alignment_cases import CODEBOOK_SIZES, NUM_ITEMS, tiny_generator, tiny_tokenizer
from datasets import Dataset

from onerec_hf import Recommender
from onerec_hf.demo.cards import catalogue_cards, picture, result
from onerec_hf.demo.choice import CHOSEN, LIKELIEST, Settings, choose, found_items, with_item, without_item
from onerec_hf.demo.content import DemoContent, anonymous, fit_baselines
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel, SessionScorer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
HISTORIES = [[100, 101, 102, 103], [104, 105, 100], [110, 111, 100, 101], [101, 120]]


@pytest.fixture(scope="module")
def content():
    torch.manual_seed(0)
    config = OneRecRewardConfig(codebook_sizes=CODEBOOK_SIZES, hidden_size=16, tower_hidden_size=16, session_items=2)
    world = SimpleNamespace(expected_feedback=lambda users, items: {"swt": items[..., 0] / 1000})
    names = [f"Song <{item}>" for item in range(NUM_ITEMS)]
    return DemoContent(
        Recommender(tiny_generator().eval(), tiny_tokenizer()),
        SessionScorer(OneRecRewardModel(config).eval(), tiny_tokenizer()),
        pd.DataFrame({"name": names, "image": [PIXEL, *[None] * (NUM_ITEMS - 1)]}),
        Dataset.from_dict({"user_id": [f"ann{row}" for row in range(4)], "history_item_ids": HISTORIES}),
        fit_baselines([np.array(history) - 100 for history in HISTORIES], NUM_ITEMS, {}),
        world,
    )


def test_a_click_changes_all_columns_of_a_history():
    row = {
        "history_item_ids": [5, 6],
        "history_feedback": [[1, 0], [0, None]],
        "history_timestamps": [1.0, 2.0],
        "timestamp": 9.0,
        "exposed_item_ids": [5, 7, 5, 6],
        "exposed_feedback": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
        "user_features": {"country": "de"},
    }
    added = with_item(row, 8, num_conditions=2)
    assert added["history_item_ids"] == [5, 6, 8] and added["history_feedback"][2] == [None, None]
    assert added["history_timestamps"] == [1.0, 2.0, 9.0] and added["exposed_item_ids"] == [5, 7, 5, 6, 8]
    assert added["exposed_feedback"][:8] == row["exposed_feedback"]
    assert len(added["exposed_feedback"]) == 10 and all(map(math.isnan, added["exposed_feedback"][8:]))
    dropped = without_item(row, 0)
    assert dropped["history_item_ids"] == [6] and dropped["history_feedback"] == [[0, None]]
    assert dropped["history_timestamps"] == [2.0] and dropped["exposed_item_ids"] == [5, 7, 6]
    assert dropped["exposed_feedback"] == [0.1, 0.2, 0.3, 0.4, 0.7, 0.8]
    assert dropped["user_features"] == row["user_features"] and len(row["history_item_ids"]) == 2
    # Who has no exposure left is judged by the history.
    last = without_item({**row, "exposed_item_ids": [5], "exposed_feedback": [0.1, 0.2]}, 0)
    assert (last["exposed_item_ids"], last["exposed_feedback"]) == (None, None)


def test_a_new_history_has_what_the_model_reads(content):
    config = {"history_feedback": ["like", "follow"], "time_gap_buckets": 4, "user_features": {"country": ["de"]}}
    model = tiny_generator(**config).eval()
    users = Dataset.from_dict({"user_id": [1], "history_item_ids": [[100]], "timestamp": [50.0]})
    asked = replace(content, recommender=Recommender(model, tiny_tokenizer()), users=users, world=None)
    row = asked.new_row()
    assert (row["timestamp"], row["user_features"]) == (50.0, {"country": None})
    for item in (103, 104):
        row = with_item(row, item, num_conditions=2)
    assert len(choose(asked, row, Settings()).ranked) == 10


def test_the_choice_is_the_recommenders(content):
    row, plain = content.user_row("ann1"), content.recommender
    expected = plain([row], 10)[0]
    choice = choose(content, row, Settings())
    assert [found.item + 100 for found in choice.ranked] == expected["items"]
    assert [found.score for found in choice.ranked] == expected["scores"]
    assert [found.rank_before for found in choice.ranked] == [*range(1, 11)]
    assert choice.session == choice.likeliest == [item - 100 for item in expected["session"]]

    first, session = expected["items"][0], expected["session"]
    blocked = tuple(item - 100 for item in {first, *session})
    changed = choose(content, row, Settings(blocked))
    ranked = [found.item for found in changed.ranked]
    assert not set(blocked) & {*ranked, *changed.session, *sum(changed.baselines.values(), [])}
    before = [found.item for found in choice.ranked]
    assert [found.rank_before for found in changed.ranked] == [
        before.index(item) + 1 if item in before else None for item in ranked
    ]
    assert changed.likeliest == choice.likeliest

    guided = Recommender(plain.model, plain.tokenizer, content.scorer)
    expected = guided([row], 10, search="guided_beam", guidance_weight=40.0)[0]
    assert [item + 100 for item in choose(content, row, Settings((), 40.0)).session] == expected["session"]
    assert expected["session"] != session
    expected = plain([row], 10, search="stochastic_beam", temperature=2.0, seed=3)[0]
    drawn = choose(content, row, Settings((), 0.0, 2.0, 3))
    assert [found.item + 100 for found in drawn.ranked] == expected["items"]
    assert [item + 100 for item in drawn.session] == expected["session"]


def test_sessions_side_by_side_and_what_they_are_worth(content):
    row = content.user_row("ann1")
    choice = choose(content, row, Settings((), 40.0))
    assert choice.baselines["Popularity"][:3] == [1, 2, 3]  # 0 is in the history
    rewards, scorer = choice.rewards, content.scorer
    assert rewards.index.tolist() == [LIKELIEST, CHOSEN, "Popularity", "Item-KNN", "EASE"]
    sessions = torch.tensor([[choice.likeliest, choice.session, [1, 2]]])
    scores = scorer.score([{"history": [4, 5, 0]}], sessions)
    np.testing.assert_allclose(rewards["Reward model", "reward"].iloc[:3], scores.reward[0], rtol=1e-5)
    np.testing.assert_allclose(rewards["Reward model"][scorer.objectives].iloc[:3], scores.probabilities[0], rtol=1e-5)
    assert rewards["Truth", "swt"].tolist()[:3] == [(100 + item) / 1000 for item in sessions[0, :, 0].tolist()]
    # Nobody knows the truth of a history without a user.
    new = with_item(content.new_row(), 107)
    assert choose(content, new, Settings()).rewards.columns.get_level_values(0).unique().tolist() == ["Reward model"]
    assert choose(replace(content, scorer=None), row, Settings()).rewards is None


def test_what_cannot_be_shown_says_why(content):
    with pytest.raises(ValueError, match="no user 'bob' among these 4: take one such as ann0, ann1"):
        content.user_row("bob")
    with pytest.raises(ValueError, match="history is empty: pick a user, or click"):
        choose(content, content.new_row(), Settings())
    with pytest.raises(ValueError, match="No item is left to recommend: all are blocked"):
        choose(content, content.user_row("ann0"), Settings(tuple(range(NUM_ITEMS))))


def test_visitors_do_not_disturb_one_another(content):
    asked = [
        (content.user_row(f"ann{number % 4}"), Settings((number,), 8.0 * (number % 2), number % 3, number))
        for number in range(6)
    ]
    alone = [choose(content, *one) for one in asked]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda one: choose(content, *one), asked))
    for one, other in zip(alone, together, strict=True):
        assert (one.session, one.ranked, one.baselines) == (other.session, other.ranked, other.baselines)
        pd.testing.assert_frame_equal(one.rewards, other.rewards)


def test_items_are_found_by_words_and_shown_as_text(content):
    assert found_items(content, "")[:2] == [0, 1] and found_items(content, "SONG <7") == [7]
    assert found_items(content, "123") == [23] and found_items(content, "song none") == []
    pictured = replace(
        content, items=content.items.assign(image=["https://x.org/a.png?b&c", "javascript:x", *[None] * 28])
    )
    assert 'src="https://x.org/a.png?b&amp;c"' in picture(pictured, 0)
    assert all("--hue:" in picture(pictured, item) for item in (1, 2))
    for html in (
        catalogue_cards(content, "7"),
        result(content, choose(content, content.user_row("ann0"), Settings())),
    ):
        assert "Song &lt;" in html and "Song <" not in html


def test_a_folder_gives_the_page_back_without_who_the_users_are(content, tmp_path):
    assert content.save(tmp_path) == 4
    loaded = DemoContent.load(tmp_path)
    assert list(loaded.user_ids) == ["1", "2", "3", "4"] and loaded.users.column_names == [
        "user_id",
        "history_item_ids",
    ]
    kept, found = (choose(one, one.user_row(user), Settings()) for one, user in ((content, "ann2"), (loaded, "3")))
    assert (kept.session, kept.ranked, kept.baselines) == (found.session, found.ranked, found.baselines)
    pd.testing.assert_frame_equal(kept.rewards[["Reward model"]], found.rewards)
    row = {"user_id": "ann", "history_item_ids": [5], "history_timestamps": [7.0], "timestamp": 9.0}
    row |= {"user_features": {"country": "de"}, "user_profile": {"age": "40"}, "exposed_item_ids": [5]}
    assert anonymous(row, 3) == {
        **{"user_id": "3", "history_item_ids": [5], "history_timestamps": [-2.0], "timestamp": 0.0},
        "user_features": {"country": None},
    }


@pytest.fixture(scope="module")
def address(content, tmp_path_factory):
    """Of the app of a Space's folder, started as the Hub does, from another directory."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -c constraints.txt -e '.[demo]'")
    from onerec_hf.demo.space import write_space

    folder = tmp_path_factory.mktemp("spaces") / "space"
    write_space(content, folder, "Songs")
    with pytest.raises(FileExistsError, match="not empty: give --space a new folder"):
        write_space(content, folder, "Songs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    started = [sys.executable, str(folder / "app.py")]
    log = folder.parent / "log"
    with open(log, "wb") as output:
        app = subprocess.Popen(started, cwd=folder.parent, env=environment, stdout=output, stderr=output)
    deadline = time.monotonic() + 120
    while "Running on local URL" not in log.read_text():
        assert app.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    app.terminate()
    app.wait()


@pytest.fixture
def page(address):
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="a browser is driven by playwright: pip install -c constraints.txt playwright"
    )
    if CHROMIUM is None:
        pytest.skip("the page is tested in Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(address)
        yield page
        browser.close()


def test_the_page_in_a_browser(page):
    expect = pytest.importorskip("playwright.sync_api").expect
    expect.set_options(timeout=60_000)
    names, history = page.locator("#ranked .name"), page.locator("#history .card")
    expect(names).to_have_count(10)
    expect(page.locator("#session .card")).to_have_count(2)

    user = page.locator("#user input")
    user.fill("2")
    user.press("Enter")
    expect(history).to_have_count(3)
    assert history.first.get_by_text("Song <0>").count() == 1  # the latest first
    assert page.locator("#history img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 1
    listed = names.all_inner_texts()

    added = page.locator("#catalogue .card").filter(has_text=listed[0])
    added.click()
    expect(history).to_have_count(4)
    expect(history.first).to_contain_text(listed[0])
    expect(names).not_to_have_text(listed)
    assert listed[0] not in names.all_inner_texts()

    first = names.first.inner_text()
    page.locator("#ranked [data-action=block]").first.click()
    expect(page.locator("#blocked .chip")).to_contain_text(first)
    assert first not in names.all_inner_texts()

    page.locator("#guidance input[type=number]").fill("16")
    page.locator("#guidance input[type=number]").press("Enter")
    expect(page.locator("#results")).to_contain_text("changed by the settings")

    user.fill("nobody")
    user.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("There is no user 'nobody' among these 4")
    page.get_by_role("button", name="Empty history").click()
    expect(page.get_by_role("alert")).to_contain_text("The history is empty")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
