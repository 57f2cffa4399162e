"""Eight clients, 200 requests: some leave, read slowly or send nonsense; the others get what they would get alone."""

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import openai
import psutil
import pytest

pytestmark = pytest.mark.slow
PROMPTS = ["import os\n", "class Stack:\n", "for x in range(3):\n", "def add(a, b):\n"]
CLIENTS, REQUESTS, TOKENS = 8, 200, 24


def ask(client, number):
    """Ask for an answer that depends on the number alone."""
    reply = client.completions.create(
        model="nano", prompt=PROMPTS[number % 4], max_tokens=TOKENS, temperature=0.8, seed=number // 4 % 3
    )
    return reply.choices[0].text


def leave(client, number):
    """Ask for much, read a little, and leave."""
    stream = client.completions.create(
        model="nano", prompt=PROMPTS[number % 4], max_tokens=2000, temperature=1.5, seed=number, stream=True
    )
    next(iter(stream))
    stream.close()


def read_slowly(client, number):
    stream = client.completions.create(model="nano", prompt=PROMPTS[number % 4], max_tokens=8, stream=True)
    text = ""
    for chunk in stream:
        text += chunk.choices[0].text
        time.sleep(0.05)
    return text


def send(url, body):
    """Send a body; return the status line, or nothing where the connection ended."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        try:
            connection.sendall(body)
            return connection.recv(64).decode().partition("\r\n")[0]
        except (BrokenPipeError, ConnectionResetError):
            return ""


def test_none_is_lost_memory_stays_and_nothing_else_gets_through(start_server):
    draw, lock, statuses = random.Random(3), threading.Lock(), []
    kinds = draw.choices(["ask", "leave", "slow", "large", "malformed", "cut"], [120, 25, 15, 10, 20, 10], k=REQUESTS)
    with start_server("--queue", "64", "--cache-mib", "16") as running:
        client = openai.OpenAI(**running.key_and_base(), max_retries=0)
        alone = {number: ask(client, number) for number in range(12)}
        short = [read_slowly(client, number) for number in range(4)]
        process, sizes = psutil.Process(running.process.pid), []

        def one(number):
            kind = kinds[number]
            if kind == "ask":
                assert ask(client, number) == alone[number % 12]
            elif kind == "leave":
                leave(client, number)
            elif kind == "slow":
                assert read_slowly(client, number) == short[number % 4]
            elif kind == "large":
                assert send(running.url, b"x" * 5_000_000)[:12] in ("HTTP/1.1 413", "")
            elif kind == "malformed":
                body = draw.choice([b"{", b"[]", b'{"prompt": {}}', b'{"prompt": "x", "n": -1}', b"\xff\xfe", b"null"])
                assert send(running.url, body).startswith("HTTP/1.1 400")
            else:
                # a body that is never sent whole: the connection ends here
                send_cut(running.url)
            with lock:
                statuses.append(kind)
                sizes.append(process.memory_info().rss)

        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(one, range(REQUESTS)))

        assert sorted(statuses) == sorted(kinds)
        wait_until_idle(client, running.url)
        # once caches are warm nothing is added
        assert max(sizes[REQUESTS // 2 :]) < 1.1 * max(sizes[: REQUESTS // 2])
        assert {number: ask(client, number) for number in range(12)} == alone
        assert "Traceback" not in running.log.read_text()
        assert " 500 " not in running.log.read_text()
        client.close()


def send_cut(url):
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f'{head}Content-Length: 100\r\n\r\n{{"prompt"'.encode())


def wait_until_idle(client, url):
    """Wait until no request is under way: those that were left have ended."""
    for _ in range(600):
        metrics = client.get(f"{url}/metrics", cast_to=str)
        if "space_requests_active 0.0" in metrics and "space_requests_waiting 0.0" in metrics:
            return
        time.sleep(0.05)
    raise AssertionError(metrics)
