"""What passes over the wire: curl, `llm`, who is let in, what is refused, and how it ends."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import openai
import pytest

BODY = json.dumps({"messages": [{"role": "user", "content": "Write add."}], "max_tokens": 8})
JSON = ("-H", "Content-Type: application/json")


def curl(url, *arguments):
    """Return status and body of a request by curl."""
    done = subprocess.run(
        ["curl", "-sS", "-N", "-w", "\\n%{http_code}", url, *arguments], capture_output=True, text=True, check=True
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def wait_for(url, figure):
    """Wait until the metrics have a figure."""
    for _ in range(500):
        if figure in curl(f"{url}/metrics")[1]:
            return
        time.sleep(0.02)
    raise AssertionError(curl(f"{url}/metrics")[1])


pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def test_curl_gets_whole_and_streamed_answers(server):
    status, whole = curl(f"{server.url}/v1/chat/completions", *JSON, "-d", BODY)
    streamed_status, streamed = curl(
        f"{server.url}/v1/chat/completions", *JSON, "-d", json.dumps({**json.loads(BODY), "stream": True})
    )

    assert status == streamed_status == 200
    events = [line.removeprefix("data: ") for line in streamed.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert text == json.loads(whole)["choices"][0]["message"]["content"]


def test_a_corpus_drafts_and_changes_nothing(server, start_server, tmp_path):
    body = json.dumps({**json.loads(BODY), "max_tokens": 40})
    plain = json.loads(curl(f"{server.url}/v1/chat/completions", *JSON, "-d", body)[1])
    (tmp_path / "answer.txt").write_text(plain["choices"][0]["message"]["content"])

    with start_server("--corpus", tmp_path / "answer.txt") as knows:
        found = json.loads(curl(f"{knows.url}/v1/chat/completions", *JSON, "-d", body)[1])

    assert found["choices"] == plain["choices"]
    accepted = [each["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] for each in (plain, found)]
    assert accepted[1] > accepted[0]


def test_health_models_metrics_and_docs(server):
    assert json.loads(curl(f"{server.url}/health")[1])["status"] == "ok"
    assert "nano" in [model["id"] for model in json.loads(curl(f"{server.url}/v1/models")[1])["data"]]
    curl(f"{server.url}/v1/chat/completions", *JSON, "-d", BODY)
    _, metrics = curl(f"{server.url}/metrics")
    assert 'space_requests_total{path="/v1/chat/completions",status="200"}' in metrics
    assert "space_accepted_drafts_total" in metrics
    status, page = curl(f"{server.url}/docs")
    assert status == 200
    assert all(name in page for name in ("/v1/chat/completions", "response_format", "repetition_penalty"))
    assert "requestBody" in json.loads(curl(f"{server.url}/openapi.json")[1])["paths"]["/v1/completions"]["post"]


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        ((*JSON, "-d", '{"messages":'), 400, "invalid_value"),
        ((*JSON, "-d", "[" * 100_000), 400, "invalid_value"),
        ((*JSON, "-d", '{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'), 400, "invalid_value"),
        (("-H", "Content-Type: text/plain", "-d", BODY), 415, "unsupported_media_type"),
        ((*JSON, "--data-binary", "@LARGE"), 413, "body_too_large"),
        ((*JSON, "-H", "Transfer-Encoding: chunked", "--data-binary", "@LARGE"), 413, "body_too_large"),
        (("-X", "GET"), 405, "not_found"),
        ((*JSON, "-H", "Origin: https://evil.example", "-d", BODY), 403, "origin_not_allowed"),
        ((*JSON, "-H", "Origin: null", "-d", BODY), 403, "origin_not_allowed"),
        ((*JSON, "-H", "Sec-Fetch-Site: cross-site", "-d", BODY), 403, "origin_not_allowed"),
        ((*JSON, "-H", "Host: evil.example:8000", "-d", BODY), 403, "host_not_allowed"),
        ((*JSON, "-H", "Host: [", "-d", BODY), 403, "host_not_allowed"),
    ],
)
def test_errors_are_of_openais_form(server, tmp_path, arguments, status, code):
    large = tmp_path / "large.json"
    large.write_text('{"x": "' + "x" * 5_000_000 + '"}')
    arguments = [each.replace("LARGE", str(large)) for each in arguments]

    got, body = curl(f"{server.url}/v1/chat/completions", *arguments)

    error = json.loads(body)["error"]
    assert (got, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert str(tmp_path) not in body


def test_paths_that_are_not_there(server):
    status, body = curl(f"{server.url}/v1/embeddings", *JSON, "-d", "{}")

    assert (status, json.loads(body)["error"]["type"]) == (404, "not_found_error")


def test_llm_answers_through_the_server(server, tmp_path, clean_env):
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: space\n  model_name: nano\n  api_base: {server.url}/v1\n  api_key_name: space\n"
    )
    env = clean_env | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    command = [sys.executable, "-m", "llm", "-m", "space", "Write add.", "-o", "max_tokens", "20", "--key", "none"]

    streamed = subprocess.run(command, env=env, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    whole = subprocess.run(
        [*command, "--no-stream"], env=env, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )

    expected = json.loads(curl(f"{server.url}/v1/chat/completions", *JSON, "-d", BODY.replace("8}", "20}"))[1])
    assert streamed.stdout == whole.stdout == expected["choices"][0]["message"]["content"] + "\n"


def test_prompts_are_in_the_log_only_where_asked_for(server, start_server):
    secret = json.dumps({"prompt": "my secret", "max_tokens": 2})
    curl(f"{server.url}/v1/completions", *JSON, "-d", secret)
    assert "/v1/completions nano 200" in server.log.read_text()
    assert "my secret" not in server.log.read_text()

    with start_server("--log-prompts") as telling:
        curl(f"{telling.url}/v1/completions", *JSON, "-d", secret)
        assert "my secret" in telling.log.read_text()


def test_a_key_is_demanded_where_others_can_reach(run_space, start_server, tmp_path):
    refused = run_space("serve", "--host", "0.0.0.0", "--port", "0")
    assert refused.returncode == 2
    assert "SPACE_API_KEY" in refused.stderr
    key = tmp_path / "key"
    key.write_text("s3cret\n")

    with start_server("--host", "0.0.0.0", "--api-key-file", key, "--allow-origin", "https://mine.example") as running:
        url = running.url.replace("0.0.0.0", "127.0.0.1")
        for header in ((), ("-H", "Authorization: Bearer s3cre"), ("-H", "Authorization: s3cret")):
            status, body = curl(f"{url}/v1/models", *header)
            assert (status, json.loads(body)["error"]["type"]) == (401, "authentication_error")
        assert curl(f"{url}/metrics")[0] == 401
        assert curl(f"{url}/health")[0] == 200
        with openai.OpenAI(api_key="s3cret", base_url=f"{url}/v1") as client:
            assert client.models.list().data
        mine = ("-H", "Origin: https://mine.example")
        assert curl(f"{url}/v1/models", "-X", "OPTIONS", *mine)[0] == 204
        status, headers = curl(f"{url}/v1/models", "-i", *mine, "-H", "Authorization: Bearer s3cret")
        assert status == 200
        assert "access-control-allow-origin: https://mine.example" in headers.lower()
        assert curl(f"{url}/v1/models", "-H", "Origin: https://other.example")[0] == 403


def test_an_address_that_is_taken_is_reported_in_one_line(run_space):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_space("serve", "--model", "nano", "--port", taken.getsockname()[1])

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_sigterm_lets_answers_end_and_refuses_those_that_wait(start_server):
    with start_server("--parallel", "1") as running:
        long, more = {"prompt": "import", "max_tokens": 400, "temperature": 1.5, "seed": 1}, '{"prompt": "x"}'
        with openai.OpenAI(**running.key_and_base(), max_retries=0) as client:
            stream = client.completions.create(model="nano", stream=True, **long)
            next(iter(stream))
            waiting = subprocess.Popen(
                ["curl", "-sS", f"{running.url}/v1/completions", *JSON, "-d", more], stdout=subprocess.PIPE, text=True
            )
            wait_for(running.url, "space_requests_waiting 1.0")

            running.process.send_signal(signal.SIGTERM)

            rest = list(stream)
        assert rest[-1].choices[0].finish_reason in ("length", "stop")
        assert json.loads(waiting.communicate()[0])["error"]["code"] == "shutting_down"
        assert running.process.wait(30) == 0


def test_ctrl_c_ends_with_the_code_of_an_interruption(start_server):
    with start_server() as running:
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(30) == 130


def test_a_full_queue_is_reported_and_a_client_that_leaves_makes_room(start_server):
    long = json.dumps({"prompt": "import", "max_tokens": 400, "temperature": 1.5, "seed": 1, "n": 8})
    with start_server("--parallel", "1", "--queue", "1") as running:
        ask = ["curl", "-sS", f"{running.url}/v1/completions", *JSON, "-d", long]
        clients = [subprocess.Popen(ask, stdout=subprocess.DEVNULL) for _ in range(2)]
        try:
            wait_for(running.url, "space_requests_waiting 1.0")
            status, headers = curl(f"{running.url}/v1/completions", "-i", *JSON, "-d", long)
        finally:
            for client in clients:
                client.kill()
                client.wait()
        wait_for(running.url, "space_requests_active 0.0")
        after, _ = curl(f"{running.url}/v1/completions", *JSON, "-d", json.dumps({"prompt": "x", "max_tokens": 1}))

        assert status == 429
        assert "retry-after" in headers.lower()
        assert json.loads(headers[headers.index("{") :])["error"]["code"] == "queue_full"
        assert after == 200
