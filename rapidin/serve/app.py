"""The web application: questions, answers, rows, and the pages that show them.

Work with the model is a job (`rapidin.serve.jobs`). A request for an event stream gets the job's events, as
server-sent events; any other waits for the result. A job is cancelled when its request is closed.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException

import rapidin
from rapidin.errors import UserError
from rapidin.results.html import page
from rapidin.results.json import results_json, results_value
from rapidin.serve import pages
from rapidin.serve.guard import Access, Guard
from rapidin.serve.jobs import CancelledError, Job, QueueFullError, Worker
from rapidin.serve.service import Answer, Question, Service

_LOG = logging.getLogger("rapidin.serve")
_STREAM = "text/event-stream"
_STOPPING, _FAILED = "the server is stopping", "an error in rapidin, which its log shows"
_GONE_SECONDS = 0.25  # between two looks at whether the client is still there
_ASSETS = {"live.js": "text/javascript", "live.css": "text/css"}
_MOST_CHARACTERS = 100_000  # of a text


class Asked(BaseModel):
    """A question, or a whole prompt, with the answer if it is known."""

    model_config = ConfigDict(extra="forbid")

    ask: Annotated[
        str | None,
        Field(description="A question, put in the form of the training data.", max_length=_MOST_CHARACTERS),
    ] = None
    prompt: Annotated[
        str | None,
        Field(
            description="A whole text that the model reads, with nothing around it.",
            max_length=_MOST_CHARACTERS,
        ),
    ] = None
    max_new_tokens: Annotated[
        int, Field(description="Tokens that the model writes at most.", ge=1, le=1024)
    ] = 64

    @model_validator(mode="after")
    def _one_of_both(self) -> "Asked":
        if (self.ask is None) == (self.prompt is None):
            raise ValueError("give either 'ask' or 'prompt'")
        return self

    def question(self) -> Question:
        return Question(**self.model_dump())


class ToExplain(Asked):
    """A question whose answer is explained by training examples."""

    completion: Annotated[
        str | None,
        Field(description="The answer; without it the model answers.", max_length=_MOST_CHARACTERS),
    ] = None
    top_k: Annotated[int, Field(description="Examples at each end of the ranking.", ge=1, le=200)] = 10
    words: Annotated[
        bool,
        Field(
            description="Rank examples for each word of the answer too, and say which of their words "
            "contribute. Takes longer."
        ),
    ] = False
    by: Annotated[
        str | None, Field(description="Sum scores by this column of the training data.", max_length=200)
    ] = None
    interactions: Annotated[
        bool,
        Field(description="Also estimate what leaving out a group of `by` changes while the others stay."),
    ] = False
    fdr: Annotated[
        float | None,
        Field(
            description="Only hits that pass this false-discovery rate; needs a cache with decoys.",
            gt=0,
            lt=1,
        ),
    ] = None


class Problem(BaseModel):
    """Why a request is not answered."""

    detail: str


class Generated(BaseModel):
    """What the model answers."""

    prompt: str
    completion: str


class Summary(BaseModel):
    """An answer of the history."""

    id: str
    question: str
    completion: str
    verdict: str | None
    words: bool
    when: str


class Row(BaseModel):
    """A training example: its number among the rows, its index in the data, its columns, and how the model
    reads it; null for a malformed one."""

    row: int
    index: int
    record: dict[str, Any] | None
    read: dict[str, Any] | None


class About(BaseModel):
    """What the server answers with."""

    version: str
    examples: int
    columns: list[str]
    facts: dict[str, str]
    waiting: int


def create_app(service: Service, worker: Worker, access: Access) -> Guard:
    """The application, which lets in whom `access` says."""
    app = FastAPI(
        title="rapidin",
        version=rapidin.__version__,
        description="The training examples behind what a language model says.",
        docs_url=None,  # its page takes scripts from elsewhere
        redoc_url=None,
        dependencies=[Depends(HTTPBearer(auto_error=False, description="The token of the address."))],
        responses={
            status: {"model": Problem, "description": what}
            for status, what in ((400, "A mistake"), (401, "No token, or a wrong one"), (403, "Another site"))
        },
    )

    _add_errors(app, worker)
    for router in (_questions(service, worker), _data(service, worker), _answers(service), _pages(service)):
        app.include_router(router)
    return Guard(app, access)


def _add_errors(app: FastAPI, worker: Worker) -> None:
    """Every error has a `detail`, a text; a browser gets a page."""

    def said(request: Request, status: int, detail: str, **headers: str) -> Response:
        if _wants_page(request):
            return HTMLResponse(pages.message_page(detail).encode(), status)
        return JSONResponse({"detail": detail}, status, {k.replace("_", "-"): v for k, v in headers.items()})

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return said(request, 400, _without_folders(str(error)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return said(request, 422, "; ".join(_problem(each) for each in error.errors()))

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        return said(request, error.status_code, str(error.detail))

    @app.exception_handler(QueueFullError)
    async def queue_full(request: Request, _: QueueFullError) -> Response:
        if worker.closed:
            return said(request, 503, _STOPPING)
        many = "1 question waits" if worker.most == 1 else f"{worker.most:,} questions wait"
        return said(request, 503, f"{many} already; try again in 2 seconds", Retry_After="2")

    @app.exception_handler(CancelledError)
    async def cancelled(request: Request, _: CancelledError) -> Response:
        return said(request, 503, _STOPPING)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        _LOG.error("an error in rapidin", exc_info=error)
        return said(request, 500, _FAILED)


def _without_folders(text: str) -> str:
    """A message with the names of files alone: folders of the server are no business of its users."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", text)


def _problem(error: Mapping[str, Any]) -> str:
    """What is wrong with a request, in words."""
    kind, where = error["type"], [str(part) for part in error["loc"][1:]]
    if kind == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']}, at character {error['loc'][-1]}"
    if kind == "extra_forbidden":
        return f"unknown field '{where[-1]}'; there are {', '.join(ToExplain.model_fields)}"
    if not where and kind in ("model_attributes_type", "dict_type", "model_type", "missing"):
        return "the body is not a JSON object, or the header 'Content-Type: application/json' is missing"
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"{where[-1]}: {text[:1].lower()}{text[1:]}" if where else text


def _questions(service: Service, worker: Worker) -> APIRouter:
    """What the model has to work for."""
    router = APIRouter()

    @router.post("/query", summary="The training examples behind an answer")
    async def query(request: Request, body: Annotated[ToExplain, Body()]) -> Response:
        """As `rapidin query --json` writes it, with an `id` and its address `url`. With the header `Accept:
        text/event-stream` events come first: `waiting` (`before`), `answer` (`text`, what the model has
        written further), `stage` (`stage`, `done`, `total`), then `result` or `error` (`detail`)."""
        question = body.question()
        service.check(question)
        return await _done(request, worker, lambda job: service.explain(question, job), _answer_json)

    @router.post("/generate", summary="The model's answer", response_model=Generated)
    async def generate(request: Request, body: Annotated[Asked, Body()]) -> Response:
        """What the model answers, greedily. Events are as those of `/query`."""
        question = body.question()
        service.check(question)
        return await _done(request, worker, lambda job: service.generate(question, job), dict)

    return router


def _data(service: Service, worker: Worker) -> APIRouter:
    """What the server knows."""
    router = APIRouter()

    @router.get("/rows/{row}", summary="A training example", response_model=Row)
    def row(request: Request, row: int) -> Response:
        found = service.row(row)
        if found is None:
            raise HTTPException(404, "there is no such row")
        if _wants_page(request):
            return _page(pages.row_page(found))
        return Response(pages.safe_json(found), media_type="application/json")

    @router.get("/about", summary="The model and the data", response_model=About)
    def about() -> Any:
        return {
            "version": rapidin.__version__,
            "examples": len(service.ensemble.caches[-1]),
            "columns": service.columns,
            "facts": service.about,
            "waiting": worker.waiting,
        }

    @router.get("/health", summary="Whether the server runs")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return router


def _answers(service: Service) -> APIRouter:
    """The answers that are kept."""
    router = APIRouter()

    @router.get("/answers", summary="The last answers", response_model=list[Summary])
    def answers() -> Any:
        return [answer.summary for answer in service.history.latest()]

    @router.get("/answers/{name}", summary="An answer again, as /query gave it, or as a page")
    def answer(request: Request, name: str) -> Response:
        kept = _found(service, name)
        if _wants_page(request):
            return _page(pages.answer_page(kept, service))
        return Response(pages.safe_json(_answer_json(kept)), media_type="application/json")

    @router.get("/answers/{name}/hits.json", summary="An answer as 'rapidin query --json' writes it")
    def hits(name: str) -> Response:
        kept = _found(service, name)
        return _saved(results_json(kept.results, kept.made) + "\n", "application/json", "hits.json")

    @router.get("/answers/{name}/report.html", summary="An answer as 'rapidin query --report' writes it")
    def report(name: str) -> Response:
        text = page(_found(service, name).results, about=service.about)
        return _saved(text, "text/html", "report.html")

    @router.delete("/answers/{name}", summary="Forget an answer", status_code=204)
    def forget(name: str) -> Response:
        if not service.history.remove(name):
            raise _no_answer()
        return Response(status_code=204)

    return router


def _pages(service: Service) -> APIRouter:
    """What a browser shows besides."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def home() -> Response:
        return _page(pages.home_page(service))

    @router.get("/compare")
    def compare(a: Annotated[str, Query()], b: Annotated[str, Query()]) -> Response:
        return _page(pages.compare_page(_found(service, a), _found(service, b), service))

    @router.get("/favicon.ico")
    async def icon() -> Response:
        return Response(status_code=204)

    @router.get("/static/{name}")
    def asset(name: str) -> Response:
        if name not in _ASSETS:
            raise HTTPException(404, "there is no such file")
        text = (resources.files("rapidin.serve") / name).read_text(encoding="utf-8")
        return Response(text, media_type=_ASSETS[name])

    return router


def _saved(text: str, kind: str, name: str) -> Response:
    """A file for the browser to save."""
    return Response(
        text.encode("utf-8", "backslashreplace"),
        media_type=kind,
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


def _found(service: Service, name: str) -> Answer:
    answer = service.history.get(name)
    if answer is None:
        raise _no_answer()
    return answer


def _no_answer() -> HTTPException:
    return HTTPException(404, "there is no such answer; the server keeps the last ones only")


# ----------------------------------------------------------------------------------------------------- jobs


async def _done(
    request: Request, worker: Worker, work: Callable[[Job], Any], to_json: Callable[[Any], Any]
) -> Response:
    """The response to a request that is work for the model."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]]()

    def tell(name: str, value: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, (name, value))

    streams = _STREAM in request.headers.get("accept", "")
    job = worker.submit(work, tell if streams else lambda *_: None)
    job.result.add_done_callback(lambda _: tell("", None))
    if streams:
        return StreamingResponse(_streamed(job, events, to_json), media_type=_STREAM)
    try:
        while not job.result.done():
            try:
                await asyncio.wait_for(events.get(), _GONE_SECONDS)
            except asyncio.TimeoutError:
                if await request.is_disconnected():
                    return Response(status_code=499)
    finally:
        job.cancel()  # of no effect once it has ended
    text = await asyncio.to_thread(lambda: pages.safe_json(to_json(job.result.result())))
    return Response(text, media_type="application/json")


async def _streamed(
    job: Job, events: "asyncio.Queue[tuple[str, Any]]", to_json: Callable[[Any], Any]
) -> AsyncIterator[bytes]:
    try:
        while True:
            name, value = await events.get()
            if not name:
                break
            yield _event(name, value)
        try:
            yield await asyncio.to_thread(lambda: _event("result", to_json(job.result.result())))
        except UserError as error:
            yield _event("error", {"detail": _without_folders(str(error))})
        except CancelledError:
            yield _event("error", {"detail": _STOPPING})
        except Exception as error:
            _LOG.error("an error in rapidin", exc_info=error)
            yield _event("error", {"detail": _FAILED})
    finally:
        job.cancel()


def _event(name: str, value: Any) -> bytes:
    return f"event: {name}\ndata: {pages.safe_json(value)}\n\n".encode()


def _answer_json(answer: Answer) -> dict[str, Any]:
    found = results_value(answer.results, answer.made)
    return {**answer.summary, "url": f"/answers/{answer.id}", **found}


def _wants_page(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


def _page(text: str) -> HTMLResponse:
    return HTMLResponse(text.encode("utf-8", "backslashreplace"))
