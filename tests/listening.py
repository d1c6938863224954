"""A server on this machine for the length of a with block: what the stand-ins of servers share."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open
    wbufsize = -1                  # one packet a reply

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """A thread for each connection."""
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, address):
        pass  # a client that went away


@contextmanager
def listening(server: Server):
    """Run it in a thread of this process."""
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
