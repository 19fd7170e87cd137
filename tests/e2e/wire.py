"""Requests as bytes, and the answers of one connection one after another, whatever was sent on it."""

import http.client
import io
import json

CLOSE = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class Stream:
    """What http.client takes for a socket: bytes that are there already."""

    def __init__(self, data):
        self.file = io.BytesIO(data)

    def makefile(self, _):
        return self

    def flush(self):
        pass

    def close(self):  # an answer that has been read closes its file, which is everyone's
        pass

    def __getattr__(self, name):
        return getattr(self.file, name)


def split_answers(data, methods=()):
    """([(status, headers, body)], what follows the last whole one). methods: of the requests, where one is HEAD.
    Raises where something is not an answer."""
    stream, answers, n = Stream(data), [], 0
    while True:
        start = stream.tell()
        if start == len(data):
            return answers, b""
        answer = http.client.HTTPResponse(stream, method=methods[n] if n < len(methods) else None)
        if b"\r\n\r\n" not in data[start:]:
            return answers, data[start:]
        try:
            answer.begin()
            body = answer.read()
        except (http.client.IncompleteRead, http.client.RemoteDisconnected, ValueError):  # in a body, after a 100, in a chunk
            return answers, data[start:]
        answers.append((answer.status, answer.headers, body))
        n += 1


def request(method, path, body=None, *headers, version="1.1", chunks=None):
    """headers: whole lines. chunks: sizes to send the body in."""
    lines = [f"{method} {path} HTTP/{version}", "Host: x", *headers]
    data = b""
    if body is not None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines.append("Content-Type: application/json")
        lines.append("Transfer-Encoding: chunked" if chunks else f"Content-Length: {len(data)}")
    if chunks:
        out, rest = b"", data
        for size in [*chunks, len(data)]:
            part, rest = rest[:size], rest[size:]
            if part:
                out += b"%x\r\n%b\r\n" % (len(part), part)
        data = out + b"0\r\n\r\n"
    return "\r\n".join([*lines, "", ""]).encode() + data
