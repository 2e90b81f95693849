"""The small endpoints: models, embeddings, tokens, health, numbers, and going on with a newer checkpoint."""

import base64
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptjax.config.section import InputError
from gptjax.serve.answers import Submission, answer_room, checked_prompt, draining, token_name
from gptjax.serve.completions import check_model, prompt_ids
from gptjax.serve.guard import is_loopback, read_body
from gptjax.serve.protocol import ApiError, DetokenizeRequest, EmbeddingRequest, TokenizeRequest, parse_request
from gptjax.serve.sequence import Sampling
from gptjax.serve.service import Service


async def models(request: Request) -> Response:
    """GET /v1/models, and /v1/models/NAME."""
    service: Service = request.app.state.service
    check_model(service, request.path_params.get("name"))
    own = {"id": service.name, "object": "model", "created": service.created, "owned_by": "gptjax"}
    own |= {"max_model_len": service.context, "step": service.model.step}
    own |= {"input_modalities": ["text", "image"] if service.vision.patch else ["text"]}
    return JSONResponse(own if "name" in request.path_params else {"object": "list", "data": [own]})


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: the mean of a text's final hidden states, divided by its length."""
    service: Service = request.app.state.service
    asked = parse_request(EmbeddingRequest, await read_body(request, service.cfg))
    check_model(service, asked.model)
    prompts = [ids for ids, _ in await run_in_threadpool(prompt_ids, service, asked.input)]
    job = Submission(service)
    for ids in prompts:
        answer_room(len(ids), 0, 0, service.context, "input")
        text = service.text_stream((), chat=False, drops_space=False)
        job.add(ids, max_new_tokens=0, sampling=Sampling(), stop_ids=(), text=text, embed=True)
    job.submit()
    async with job.watched(request.receive):
        async for _ in job.updates():
            pass
    data = []
    for i, sequence in enumerate(job.sequences):
        vector = np.asarray(sequence.embedding, "<f4")
        packed: Any = vector.tolist()
        if asked.encoding_format == "base64":
            packed = base64.b64encode(vector.tobytes()).decode()
        data.append({"object": "embedding", "index": i, "embedding": packed})
    count = sum(map(len, prompts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})


async def tokenize(request: Request) -> Response:
    """POST /tokenize, as vLLM has it."""
    service: Service = request.app.state.service
    body = await read_body(request, service.cfg, service.most_body)
    asked = await run_in_threadpool(parse_request, TokenizeRequest, body)
    check_model(service, asked.model)
    tokenizer = service.tokenizer
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "wanted either prompt, a text, or messages", param="prompt", code="invalid_value")
    if asked.messages is not None:
        messages = [message.plain(i) for i, message in enumerate(asked.messages)]
        tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or []]
        ids = (await run_in_threadpool(service.render, messages, asked.add_generation_prompt is not False, tools)).ids
    else:
        encode = tokenizer.encode if asked.add_special_tokens is False else tokenizer.prompt_ids
        ids = await run_in_threadpool(encode, asked.prompt or "")
    answer = {"count": len(ids), "max_model_len": service.context, "tokens": ids}
    if asked.return_token_strs:
        answer["token_strs"] = [
            token_name(tokenizer, i, tokenizer.decode_bytes([i]), "bytes:") if i >= 0 else "" for i in ids
        ]
    return JSONResponse(answer)


async def detokenize(request: Request) -> Response:
    """POST /detokenize, as vLLM has it."""
    service: Service = request.app.state.service
    asked = parse_request(DetokenizeRequest, await read_body(request, service.cfg))
    check_model(service, asked.model)
    return JSONResponse({"prompt": service.tokenizer.decode(checked_prompt(service, asked.tokens, "tokens"))})


async def tokenizer_info(request: Request) -> Response:
    """GET /tokenizer_info, which lm-eval asks for before it sends a text to /tokenize.

    No name of a special token is given away as a text that would stand for it: here no text becomes one.
    """
    service: Service = request.app.state.service
    return JSONResponse({"bos_token": None, "eos_token": None, "vocab_size": service.tokenizer.vocab_size})


async def health(request: Request) -> Response:
    """GET /health: 200 while requests are taken, 503 once the server ends or its device fails."""
    service: Service = request.app.state.service
    status = "draining" if service.draining else "ok" if service.scheduler.healthy else "the device fails"
    answer = {"status": status, "model": service.name, "step": service.model.step}
    return JSONResponse(answer, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics, for Prometheus."""
    page = request.app.state.monitor.page()
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


async def reload(request: Request) -> Response:
    """POST /reload: goes on with the run's newest sound checkpoint; answers that are being written end first."""
    service: Service = request.app.state.service
    if not service.cfg.api_key and not is_loopback(request):
        text = "a server without an API key is reloaded from its own machine alone"
        raise ApiError(403, text, code="reload_not_allowed")
    if service.draining:
        raise draining()
    try:
        changed = await run_in_threadpool(service.reload)
    except InputError as e:
        text = f"the newest checkpoint can't be read: {e}"
        raise ApiError(503, text, kind="server_error", code="reload_failed") from e
    return JSONResponse({"step": service.model.step, "changed": changed})
