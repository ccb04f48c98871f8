"""What a real server does with our settings: TLS that scanners take, traces that tell little."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from bentoml._internal.configuration.containers import BentoMLContainer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.applications import Starlette
from starlette.middleware import Middleware

from serving import framework, tls
from serving.app import SECURITY_HEADERS
from serving.settings import SettingError, Settings
from tests.core.test_doctor import with_golden
from tests.serving.live import picture, until
from tests.tiny_bundle import write_bundle

ROOT = Path(__file__).resolve().parents[2]
MARK = "Muster-Erika-1964"
TRACE = "0af7651916cd43dd8448eb211c80319c"


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's certificate, those of a client and of a stranger, and who signed them."""
    folder = tmp_path_factory.mktemp("papers")
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for name in ("server", "authority", "stranger"):
        pair = ["-keyout", folder / f"{name}.key", "-out", folder / f"{name}.crt"]
        more = ["-addext", "subjectAltName=DNS:localhost"] if name == "server" else []
        openssl("req", "-x509", *kind, *pair, "-subj", f"/CN={name}", *more)
    request = ["-keyout", folder / "client.key", "-out", folder / "client.csr"]
    openssl("req", *kind[:-2], *request, "-subj", "/CN=client")
    signer = ["-CA", folder / "authority.crt", "-CAkey", folder / "authority.key", "-days", "2"]
    openssl("x509", "-req", "-in", folder / "client.csr", *signer, "-out", folder / "client.crt")
    openssl(
        "ec",
        "-in",
        folder / "server.key",
        "-aes256",
        "-passout",
        "pass:x",
        "-out",
        folder / "locked.key",
    )
    return folder


class Collector:
    """Takes traces as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                bodies.append(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self) -> list[Any]:
        found = []
        for body in [*self.bodies]:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found


@dataclass(frozen=True)
class Served:
    port: int
    papers: Path
    collector: Collector
    log: Path
    process: subprocess.Popen[bytes]

    def client(self, who: str | None = "client", **limits: Any) -> ssl.SSLContext:
        """A client of this name, with these attributes of its context."""
        context = ssl.create_default_context(cafile=str(self.papers / "server.crt"))
        if who is not None:
            context.load_cert_chain(self.papers / f"{who}.crt", self.papers / f"{who}.key")
        ciphers = limits.pop("ciphers", None)
        if ciphers:
            context.set_ciphers(ciphers)
        for name, value in limits.items():
            setattr(context, name, value)
        return context

    def ask(
        self,
        context: ssl.SSLContext,
        method: str = "GET",
        path: str = "/livez",
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Any:
        way = http.client.HTTPSConnection("localhost", self.port, context=context, timeout=30)
        try:
            way.request(method, path, body, headers or {})
            reply = way.getresponse()
            reply.read()
            return reply
        finally:
            way.close()


@pytest.fixture(scope="module")
def served(papers: Path) -> Iterator[Served]:
    """The service over HTTPS, for clients with a certificate, telling a collector of its traces."""
    folder = Path(tempfile.mkdtemp(prefix="framed-"))
    collector = Collector()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DERMAFLUX_", "BENTOML_", "OTEL_", "PROMETHEUS_"))
    }
    variables = {
        "BENTOML_HOME": str(folder / "home"),
        "DERMAFLUX_BUNDLE": str(with_golden(write_bundle(folder / "bundle")).path),
        "DERMAFLUX_OTEL_ENDPOINT": collector.url,
        "DERMAFLUX_TLS_CA": str(papers / "authority.crt"),
        "DERMAFLUX_TLS_CERT": str(papers / "server.crt"),
        "DERMAFLUX_TLS_KEY": str(papers / "server.key"),
        "OMP_NUM_THREADS": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "TMPDIR": str(folder),
    }
    command = [sys.executable, "-m", "bentoml", "serve", "serving.service:DermaFlux"]
    log = folder / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=ROOT,
            env={**kept, **variables},
            stdout=stream,
            stderr=stream,
        )
    served = Served(port, papers, collector, log, process)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return bool(served.ask(served.client(), path="/readyz").status == 200)
        except OSError:
            return False

    try:
        until(ready, seconds=120)
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        collector.server.shutdown()
        shutil.rmtree(folder)


def agreed(served: Served, context: ssl.SSLContext) -> tuple[str, str]:
    """Version and cipher."""
    with (
        socket.create_connection(("localhost", served.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as way,
    ):
        cipher = way.cipher()
        assert cipher is not None
        return str(way.version()), cipher[0]


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_versions_and_ciphers_are_those_of_today(served: Served, version: str) -> None:
    only = ssl.TLSVersion[version]
    found = agreed(served, served.client(minimum_version=only, maximum_version=only))
    assert found[0] == version.replace("_", ".")
    # Authenticated encryption, and keys that a later theft of the server's does not give away.
    assert any(word in found[1] for word in ("GCM", "CHACHA20"))
    assert found[1].startswith(("ECDHE", "TLS_"))


@pytest.mark.parametrize(
    "ciphers",
    ["ECDHE-ECDSA-AES256-SHA", "ECDHE-ECDSA-AES256-SHA384", "AES256-GCM-SHA384", "DHE+AESGCM"],
)
def test_ciphers_of_yesterday_are_refused(served: Served, ciphers: str) -> None:
    two = ssl.TLSVersion.TLSv1_2
    weak = f"{ciphers}:@SECLEVEL=0"
    with pytest.raises(ssl.SSLError):
        agreed(served, served.client(ciphers=weak, minimum_version=two, maximum_version=two))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
def test_versions_of_yesterday_are_refused(served: Served, version: str) -> None:
    only = ssl.TLSVersion[version]
    old = served.client(ciphers="ALL:@SECLEVEL=0", minimum_version=only, maximum_version=only)
    with pytest.raises(ssl.SSLError):
        agreed(served, old)


@pytest.mark.parametrize("who", [None, "stranger"])
def test_clients_without_a_certificate_of_ours_are_refused(served: Served, who: str | None) -> None:
    assert served.ask(served.client()).status == 200
    # With TLS 1.3 a client learns of it at its first read.
    with pytest.raises((ssl.SSLError, ConnectionError)):
        served.ask(served.client(who))


def test_browsers_are_told_to_stay_with_https(served: Served) -> None:
    reply = served.ask(served.client(), path="/")
    assert reply.headers["strict-transport-security"].startswith("max-age=31536000")


def test_plain_http_is_not_answered(served: Served) -> None:
    way = http.client.HTTPConnection("localhost", served.port, timeout=30)
    way.request("GET", "/livez")
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        way.getresponse()


def path_of(span: Any) -> str:
    return next((one.value.string_value for one in span.attributes if "target" in one.key), "")


def test_traces_tell_of_requests_and_not_of_their_content(served: Served) -> None:
    headers = {
        "content-type": "image/png",
        "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
        "user-agent": MARK,
        "x-request-id": f"? {MARK}",
    }
    client = served.client()
    path = "/v1/classify"
    assert served.ask(client, "POST", path, picture(200), headers).status == 200
    path = f"/v1/model?name={MARK}"
    assert served.ask(client, "GET", path, headers=headers).status == 200
    assert served.ask(client, path=f"/{MARK}?{MARK}").status == 404

    def mine() -> list[Any]:
        return [span for span in served.collector.spans() if span.trace_id.hex() == TRACE]

    until(lambda: {"/v1/classify", "/v1/model"} <= {path for path in map(path_of, mine())})
    assert not any(MARK.encode() in body for body in served.collector.bodies)
    told = {one.key for span in mine() for one in span.attributes}
    assert not told & {"http.user_agent", "user_agent.original", "net.peer.ip", "client.address"}


def test_nothing_of_it_is_in_the_log(served: Served) -> None:
    served.ask(served.client(), path=f"/v1/model?{MARK}")
    log = served.log.read_text()
    assert "https://127.0.0.1" in log
    assert MARK not in log
    # A path is there, what is in the file is not.
    assert "PRIVATE KEY" not in log


def test_no_certificate_is_no_tls() -> None:
    found = framework.configuration(Settings(), tls.TRAP)
    # Whoever turns TLS on in BentoML's own configuration does not get its default of ciphers.
    assert found["api_server"]["ssl"] == {"ciphers": tls.CIPHERS}
    assert framework.configuration(Settings(), "ECDHE")["api_server"]["ssl"] == {}
    assert found["api_server"]["logging"]["access"]["enabled"] is False
    assert "tracing" not in found


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ({"cert": "server.crt"}, "DERMAFLUX_TLS_KEY is not set"),
        ({"key": "server.key"}, "DERMAFLUX_TLS_CERT is not set"),
        ({"ca": "authority.crt"}, "DERMAFLUX_TLS_CERT is not set"),
        ({"cert": "server.crt", "key": "nowhere"}, "No such file"),
        ({"cert": "server.crt", "key": "client.key"}, "are no certificate with its key"),
        ({"cert": "server.key", "key": "server.key"}, "are no certificate with its key"),
        ({"cert": "server.crt", "key": "locked.key"}, "the key is encrypted"),
        ({"cert": "server.crt", "key": "server.key", "ca": "server.key"}, "DERMAFLUX_TLS_CA="),
        ({"cert": "server.crt", "key": "server.key", "ca": "nowhere"}, "No such file"),
    ],
)
def test_wrong_files_are_told_before_the_start(
    papers: Path, names: dict[str, str], sentence: str
) -> None:
    wrong = Settings(**{f"tls_{name}": papers / file for name, file in names.items()})
    with pytest.raises(SettingError, match=sentence):
        tls.options(wrong)


def test_traces_want_an_address_and_what_sends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="needs an address such as"):
        framework.configuration(Settings(otel_endpoint="collector:4318"), None)
    monkeypatch.setattr(framework, "EXPORTER", "opentelemetry.exporter.nowhere.proto")
    with pytest.raises(SettingError, match="pip install opentelemetry-exporter-otlp-proto-http"):
        framework.configuration(Settings(otel_endpoint="http://collector:4318/v1/traces"), None)


@pytest.mark.parametrize("exporter", [None, "otlp", "zipkin"])
def test_nothing_is_traced_that_nobody_is_told(
    monkeypatch: pytest.MonkeyPatch, exporter: str | None
) -> None:
    """BentoML's own configuration may name somebody too."""

    class OpenTelemetryMiddleware:
        pass

    class Others:
        pass

    before = BentoMLContainer.config.get()
    app = Starlette(middleware=[Middleware(Others), Middleware(OpenTelemetryMiddleware)])  # type: ignore[arg-type]
    monkeypatch.setattr(framework.Service, "to_asgi", lambda *_: app)
    config = deepcopy(before)
    config["tracing"]["exporter_type"] = exporter
    BentoMLContainer.config.set(config)
    try:
        found: Any = framework.Configured.to_asgi(object.__new__(framework.Configured))
    finally:
        BentoMLContainer.config.set(before)
    assert found.user_middleware[0].cls is Others
    assert len(found.user_middleware) == (1 if exporter is None else 2)


def test_other_programs_decide_where_they_listen() -> None:
    assert framework.listening_host() is None


def family(served: Served) -> list[psutil.Process]:
    parent = psutil.Process(served.process.pid)
    return [parent, *parent.children(recursive=True)]


def test_nothing_of_the_service_listens_on_a_network_but_its_port(served: Served) -> None:
    """BentoML's process manager would: it runs any command for whoever is on this machine."""
    found = {
        (line.laddr.port, process.pid)
        for process in family(served)
        for line in process.net_connections("inet")
        if line.status == psutil.CONN_LISTEN
    }
    assert {port for port, _ in found} == {served.port}
    scorers = {one.pid for one in family(served) if "dermaflux_scorer" in one.cmdline()}
    assert len(scorers) == 1
    assert not scorers & {pid for _, pid in found}, "it would keep the port of an API that died"


def test_the_process_manager_listens_to_its_user_alone(served: Served) -> None:
    (ends,) = [one for one in served.log.parent.glob("dermaflux-*") if (one / "control").exists()]
    assert (ends / "control").is_socket()
    assert ends.stat().st_mode & 0o777 == 0o700


def test_probes_of_life_have_the_headers_too(served: Served) -> None:
    reply = served.ask(served.client(), path="/livez")
    assert reply.status == 200
    assert {name: reply.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS


def test_heads_are_not_waited_for_for_ever(served: Served) -> None:
    """What speaks HTTP in the processes is ours: it refuses two lengths of one body."""
    with (
        socket.create_connection(("localhost", served.port)) as plain,
        served.client().wrap_socket(plain, server_hostname="localhost") as way,
    ):
        lengths = b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n"
        way.sendall(b"POST /livez HTTP/1.1\r\nHost: localhost\r\n" + lengths + b"0\r\n\r\n")
        assert way.recv(1000).startswith(b"HTTP/1.1 400")


def test_sockets_of_others_are_let_go(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as plain:
        (tmp_path / str(listener.fileno())).touch()
        (tmp_path / str(plain.fileno())).touch()
        (tmp_path / "9999").touch()
        framework.close_ports_of_others(tmp_path)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(listener.detach())
        assert os.fstat(plain.fileno())
