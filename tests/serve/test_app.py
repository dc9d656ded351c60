"""rapidin.serve over a socket: what is asked, what is answered, and who is refused."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'rapidin[serve]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'rapidin[serve]'")
from live import TOKEN, Client, served, tiny_cache, tiny_service
from tiny import records, save_tiny

from rapidin.attribution.options import QueryOptions
from rapidin.cache import Cache
from rapidin.cli import main
from rapidin.serve.jobs import CancelledError, Job
from rapidin.serve.service import Question, Service

WRONG = "the token is wrong: use the address that 'rapidin serve' printed last"
PAIR = {"prompt": "One, two,", "completion": " three."}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return tiny_cache(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def service(cache: Cache) -> Service:
    return tiny_service(cache, about={"model": "tiny"}, history=4)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with served(service) as made:
        yield made


def test_an_answer_is_what_a_query_returns(client: Client, cache: Cache, service: Service) -> None:
    answered = client.post("/query", PAIR | {"top_k": 5, "words": True, "by": "source"})
    assert answered.status == 200
    options = QueryOptions(
        top_k=5, targets="tokens", contributions=True, fold=True, layers=True, histogram=True, by="source"
    )
    (expected,) = service.ensemble.query([PAIR], options)
    found, wanted = answered.json["queries"][0], json.loads(json.dumps(expected.to_json(), default=str))
    for one in (found, wanted):
        one.pop("seconds", None)
    assert found == wanted
    assert client.get(answered.json["url"]).json["queries"] == answered.json["queries"]


def test_decoys_and_interactions_are_those_of_a_query(client: Client, tmp_path: Path) -> None:
    service = tiny_service(tiny_cache(tmp_path, decoys=True))
    asked = {"by": "source", "interactions": True, "fdr": 0.5}
    options = QueryOptions(fold=True, layers=True, histogram=True, by="source", interactions=True, fdr=0.5)
    (expected,) = service.ensemble.query([PAIR], options)
    with served(service) as other:
        answered = other.post("/query", PAIR | asked)
        assert answered.status == 200
        found, wanted = answered.json["queries"][0], json.loads(json.dumps(expected.to_json(), default=str))
        assert found["decoys"] == wanted["decoys"]
        assert found["by"] == wanted["by"]
        assert [hit["index"] for hit in found["top"]] == [hit["index"] for hit in wanted["top"]]
        assert all(hit["q"] <= 0.5 for hit in found["top"])
        assert 'name="fdr"' in other.get("/", Accept="text/html").body.decode()
    for value, problem in (
        ({"fdr": 0.1}, "has no decoys"),
        ({"fdr": 1.5}, "fdr: input should be less than 1"),
        ({"interactions": True}, "between the groups of a column"),
    ):
        refused = client.post("/query", PAIR | value)
        assert refused.status in (400, 422)
        assert problem in refused.json["detail"]
    assert 'name="fdr"' not in client.get("/", Accept="text/html").body.decode()


def test_the_model_answers_and_is_followed(client: Client, cache: Cache) -> None:
    question = {"prompt": "One, two,", "max_new_tokens": 9, "words": True}
    events = client.post("/query", question, Accept="text/event-stream").events
    written = "".join(value["text"] for name, value in events if name == "answer")
    assert events[-1][0] == "result"
    (found,) = events[-1][1]["queries"]
    assert found["generated"]
    assert written == found["completion"]
    assert len([name for name, _ in events if name == "answer"]) > 1
    stages = {value["stage"] for name, value in events if name == "stage"}
    assert stages >= {"tokens of the answer", "scan caches", "tokens of hits"}
    alone = client.post("/generate", {"prompt": "One, two,", "max_new_tokens": 9})
    assert alone.json == {"prompt": "One, two,", "completion": found["completion"]}


def test_a_question_is_put_in_the_form_of_the_data(client: Client, service: Service) -> None:
    answered = client.post("/query", {"ask": "Who is quick?", "completion": " The fox."}).json
    expected = service.ensemble.ask(("Who is quick?", " The fox."))
    assert answered["queries"][0]["prompt"] == expected[0].prompt
    assert [hit["index"] for hit in answered["queries"][0]["top"]] == [hit.index for hit in expected.top]


@pytest.mark.parametrize(
    ("value", "status", "pattern"),
    [
        ({}, 422, "either 'ask' or 'prompt'"),
        ({"ask": "a", "prompt": "b"}, 422, "either 'ask' or 'prompt'"),
        ({"ask": " "}, 400, "the question is empty"),
        ({"prompt": ""}, 400, "the question is empty"),
        (PAIR | {"completion": ""}, 400, "empty"),
        (PAIR | {"top_k": 0}, 422, "greater than or equal to 1"),
        (PAIR | {"by": "no such"}, 400, "no such"),
        (PAIR | {"path": "/etc/passwd"}, 422, "unknown field 'path'; there are ask, prompt"),
        (PAIR | {"prompt": ["a"]}, 422, "prompt: input should be a valid string"),
        ([1], 422, "not a JSON object"),
    ],
)
def test_what_cannot_be_asked_is_said(client: Client, value: Any, status: int, pattern: str) -> None:
    answered = client.post("/query", value)
    assert answered.status == status
    assert pattern in answered.body.decode()
    assert isinstance(answered.json["detail"], str)
    if status == 400:
        streamed = client.post("/query", value, Accept="text/event-stream")
        assert pattern in streamed.body.decode()


def test_a_body_that_is_no_json_is_said(client: Client) -> None:
    broken = client.ask("POST", "/query", body=b'{"ask": }', Content_Type="application/json")
    assert (broken.status, "is not JSON" in broken.json["detail"]) == (422, True)
    untold = client.ask("POST", "/query", body=b'{"ask": "Who?"}', Content_Type="text/plain")
    assert "Content-Type: application/json" in untold.json["detail"]


def test_an_answer_is_saved_as_the_command_line_writes_it(
    client: Client, tmp_path: Path, cache: Cache
) -> None:
    answered = client.post("/query", PAIR).json
    page = client.get(answered["url"] + "/report.html")
    assert page.headers["content-disposition"] == 'attachment; filename="report.html"'
    assert 'class="live"' not in page.body.decode()
    saved = tmp_path / "hits.json"
    saved.write_bytes(client.get(answered["url"] + "/hits.json").body)
    data, out = cache.path.parent / "train.jsonl", tmp_path / "cleaned.jsonl"
    dropped = ["drop", str(saved), "--train-data", str(data), "--top-k", "3", "--out", str(out), "--quiet"]
    assert main(dropped) == 0
    assert len(out.read_text().splitlines()) == 27


def test_rows_have_all_of_their_columns(client: Client, cache: Cache) -> None:
    answered = client.get("/rows/4")
    assert answered.json["record"]["source"] == "book 1"
    assert answered.json["index"] == 4
    read = answered.json["read"]
    assert "".join(read["texts"][0]["pieces"]) == read["texts"][0]["text"]
    assert str(cache.path.parent) not in answered.body.decode()
    page = client.get("/rows/4", Accept="text/html")
    assert page.headers["content-type"].startswith("text/html")
    assert "book 1" in page.body.decode()
    assert "All answers" in client.get("/rows/300", Accept="text/html").body.decode()
    for path in ("/rows/30", "/rows/-1", "/rows/x", "/rows/../../etc/passwd", "/static/../app.py"):
        assert client.get(path).status in (404, 422), path


def test_the_last_answers_are_kept_and_can_be_forgotten(service: Service, client: Client) -> None:
    made = [client.post("/query", {"prompt": f"One {n}", "completion": " two."}).json for n in range(5)]
    kept = client.get("/answers").json
    assert [each["id"] for each in kept] == [each["id"] for each in reversed(made[1:])]
    assert kept[0]["question"] == "One 4"
    assert client.get(made[0]["url"]).status == 404
    page = client.get(made[4]["url"], Accept="text/html").body.decode()
    assert page.count('<section class="query"') == 1
    compared = client.get(f"/compare?a={made[3]['id']}&b={made[4]['id']}").body.decode()
    assert compared.count('<section class="query"') == 2
    assert re.search(r"Most helpful: \d+ of the \d+ are shared", compared)
    assert client.ask("DELETE", made[4]["url"]).status == 204
    assert client.get(made[4]["url"]).status == 404
    assert client.ask("DELETE", made[4]["url"]).status == 404
    home = client.get("/").body.decode()
    assert "One 3" in home
    assert "One 4" not in home


def test_texts_of_users_are_escaped(client: Client) -> None:
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    answered = client.post("/query", {"prompt": attack, "completion": attack}).json
    for path in ("/", answered["url"], f"/compare?a={answered['id']}&b={answered['id']}"):
        page = client.get(path, Accept="text/html").body.decode()
        assert "<script>alert" not in page
        assert "<img" not in page
        assert "alert(1)" in page


def test_what_the_server_offers_is_described(client: Client) -> None:
    about = client.get("/about").json
    assert (about["examples"], about["columns"], about["facts"]) == (30, ["source"], {"model": "tiny"})
    paths = client.get("/openapi.json").json["paths"]
    assert {"/query", "/generate", "/rows/{row}", "/answers", "/answers/{name}", "/about"} <= set(paths)


# ------------------------------------------------------------------------------------------------- access


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer another"}, 401),
        ({"Authorization": "", "Cookie": "rapidin-token-80=a-token"}, 401),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "evil.example@127.0.0.1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:abc"}, 403),
        ({"Host": "localhost:80:90"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 200),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
    ],
)
def test_others_are_refused(client: Client, headers: dict[str, str], status: int) -> None:
    for path in ("/", "/answers", "/rows/1", "/openapi.json", "/static/live.js"):
        assert client.get(path, **headers).status == status, path
    asked = client.post("/query", PAIR, **headers).status
    assert asked == (403 if headers.get("Sec_Fetch_Mode") else status)


def test_a_token_in_an_address_becomes_a_cookie(client: Client) -> None:
    signed = client.get(f"/answers?token={TOKEN}&x=1", Authorization="")
    assert (signed.status, signed.headers["location"]) == (303, "/answers?x=1")
    cookie = signed.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    for other in (
        "",
        'prefs={"a": 1}; ',
        "a[b]=1; ",
        "flag; ",
        "d=Mon Jan 1; ",
    ):  # of other pages of the host
        assert client.get("/answers", Authorization="", Cookie=other + cookie.split(";")[0]).status == 200
    assert client.get("/?token=another", Authorization="").json == {"detail": WRONG}
    asked = client.get("/answers", Authorization="", Accept="text/html").body.decode()
    assert '<input name="token"' in asked
    assert TOKEN not in asked
    signed = client.get(f"//evil.example/?token={TOKEN}", Authorization="")
    assert signed.headers["location"].startswith("/evil")


def test_the_origin_of_the_server_itself_may_ask(client: Client) -> None:
    own = f"http://127.0.0.1:{client.port}"
    assert client.post("/query", PAIR, Origin=own).status == 200


def test_health_needs_no_token(client: Client) -> None:
    answered = client.get("/health", Authorization="")
    assert (answered.status, answered.json) == (200, {"status": "ok"})
    assert client.get("/health", Authorization="", Host="evil.example").status == 403


def test_a_server_may_need_no_token(service: Service) -> None:
    with served(service, token=None) as client:
        assert client.get("/about", Authorization="").status == 200
        assert client.get("/about", Authorization="", Origin="http://evil.example").status == 403


def test_large_requests_are_refused(client: Client) -> None:
    body = json.dumps(PAIR | {"prompt": "x" * (1100 << 10)}).encode()
    assert client.ask("POST", "/query", body=body, Content_Type="application/json").status == 413
    connection = client.connected()  # in chunks, without a length
    try:
        parts = (body[at : at + (64 << 10)] for at in range(0, len(body), 64 << 10))
        headers = client.headers | {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        connection.request("POST", "/query", parts, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused before all of it was read
    finally:
        connection.close()
    assert client.get("/health").status == 200
    long = client.post("/query", PAIR | {"prompt": "x" * 100_001})
    assert long.status == 422


def test_all_answers_have_headers_that_protect(client: Client) -> None:
    for path in ("/", "/about", "/no-such", "/static/live.css"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
    assert "Content-Security-Policy" in client.get("/").body.decode()


# ------------------------------------------------------------------------------------------------- many


def test_a_full_queue_says_so(cache: Cache) -> None:
    service = tiny_service(cache)
    begun, go = threading.Event(), threading.Event()

    class Slow(Service):
        def explain(self, question: Question, job: Job) -> Any:
            begun.set()
            go.wait(60)
            return super().explain(question, job)

    slow = Slow(service.ensemble, service.examples, tiny_service(cache).examples)
    with served(slow, waiting=1) as client:
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(client.post("/query", PAIR).status))
            for _ in range(2)
        ]
        threads[0].start()
        assert begun.wait(60)
        threads[1].start()
        until = time.monotonic() + 60
        while client.get("/about").json["waiting"] < 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert client.post("/query", {"ask": " "}).status == 400  # a mistake need not wait
        refused = client.post("/query", PAIR)
        assert (refused.status, refused.headers["retry-after"]) == (503, "2")
        go.set()
        for thread in threads:
            thread.join(60)
    assert statuses == [200, 200]


def test_a_closed_request_cancels_its_job(cache: Cache) -> None:
    service = tiny_service(cache)
    begun, ended = threading.Event(), threading.Event()

    class Waiting(Service):
        def explain(self, question: Question, job: Job) -> Any:
            begun.set()
            while not job.cancelled:
                time.sleep(0.01)
            ended.set()
            job.check()

    waiting = Waiting(service.ensemble, service.examples, None)
    with served(waiting) as client:
        for accept in ("application/json", "text/event-stream"):
            begun.clear()
            ended.clear()
            connection = client.connected()
            body = json.dumps(PAIR)
            headers = client.headers | {"Content-Type": "application/json", "Accept": accept}
            connection.request("POST", "/query", body, headers)
            assert begun.wait(60)
            connection.close()
            assert ended.wait(60), accept


def test_a_model_stops_writing_when_its_job_is_cancelled(service: Service) -> None:
    told: list[str] = []

    def on_event(name: str, value: dict[str, Any]) -> None:
        told.append(name)
        job.cancel()

    job = Job(lambda job: service.generate(Question(prompt="One, two,", max_new_tokens=60), job), on_event)
    job.run()
    assert len(told) == 1
    assert job.result.exception() is not None


def test_a_query_stops_at_its_next_step_when_its_job_is_cancelled(service: Service) -> None:
    told: list[str] = []

    def on_event(name: str, value: dict[str, Any]) -> None:
        told.append(value["stage"])
        if len(told) == 2:
            job.cancel()

    before = service.history.latest()
    job = Job(lambda job: service.explain(Question(**PAIR), job), on_event)
    job.run()
    assert isinstance(job.result.exception(), CancelledError)
    assert told == ["prepare scans", "scan caches"]
    assert service.history.latest() == before


def test_rows_are_read_while_questions_are_answered(client: Client) -> None:
    alone = [client.get(f"/rows/{n}").json for n in range(8)]
    wrong: list[Any] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            wrong.extend(n for n in range(8) if client.get(f"/rows/{n}").json != alone[n])

    reader = threading.Thread(target=read)
    reader.start()
    found = [client.post("/query", PAIR | {"words": True}).json["queries"] for _ in range(5)]
    done.set()
    reader.join(60)
    assert wrong == []
    assert all(queries == found[0] for queries in found)


def test_a_malformed_row_is_told_and_hides_nothing_else(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path)
    rows = [json.dumps(row | {"source": "a book"}) for row in records(12)]
    (tmp_path / "train.jsonl").write_text("\n".join([*rows[:4], '{"prompt": ', *rows[4:]]) + "\n")
    made = ["--data", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "cache"), "--on-error", "skip"]
    assert main(["cache", str(saved.model), *made, "--width", "32", "--quiet"]) == 0
    with served(tiny_service(Cache(tmp_path / "cache"))) as client:
        assert client.get("/about").json["columns"] == ["source"]
        assert client.get("/rows/4").json == {"row": 4, "index": 4, "record": None, "read": None}
        assert client.get("/rows/5").json["record"]["source"] == "a book"
        assert client.get("/").status == 200
        by_file = client.post("/query", PAIR | {"by": "file"})
        assert [group["value"] for group in by_file.json["queries"][0]["by"]["groups"]] == ["train.jsonl"]
        (tmp_path / "train.jsonl").write_text("\n".join(reversed(rows)) + "\n" * 2)
        changed = client.post("/query", PAIR)
        assert (changed.status, str(tmp_path) in changed.body.decode()) == (400, False)


def test_many_clients_get_the_answers_of_one(client: Client) -> None:
    prompts = [f"One, {word}" for word in ("two", "three", "four", "five")]
    alone = [client.post("/query", {"prompt": p, "completion": " six."}).json["queries"] for p in prompts]
    found: list[tuple[int, Any]] = []

    def ask(n: int) -> None:
        answered = client.post("/query", {"prompt": prompts[n % 4], "completion": " six."})
        found.append((n % 4, answered.json["queries"] if answered.status == 200 else answered.status))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 20
    for n, queries in found:
        for one in (queries[0], alone[n][0]):
            one.pop("seconds", None)
        assert queries == alone[n]
