"""A TCP proxy that lets a request through, waits for its answer, and hangs up instead of passing it on."""

import contextlib
import socket
import threading


class CuttingProxy:
    """Between a client and 127.0.0.1:``port``. ``cut(number)`` says which answers (numbered from 0) never arrive.

    ``half``: the head of such an answer arrives, without its body.
    """

    def __init__(self, port, cut, *, half=False):
        self._target = ("127.0.0.1", port)
        self._cut = cut
        self._half = half
        self._lock = threading.Lock()
        self._num_answers = 0
        self.num_cut = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(20)
        self._listener.close()
        self._hang_up(*self._sockets)
        for thread in self._threads:
            thread.join(20)
        for end in self._sockets:
            end.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            for pump in (self._requests, self._answers):
                self._threads.append(threading.Thread(target=pump, args=(client, server)))
                self._threads[-1].start()

    def _requests(self, client, server):
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        self._hang_up(client, server)

    def _answers(self, client, server):
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 20):
                if data.startswith(b"HTTP/1.1 ") and self._is_lost():
                    if self._half:
                        client.sendall(data[: data.index(b"\r\n\r\n") + 5])
                    break
                client.sendall(data)
        self._hang_up(client, server)

    def _is_lost(self):
        with self._lock:
            lost = self._cut(self._num_answers)
            self._num_answers += 1
            self.num_cut += lost
            return lost

    @staticmethod
    def _hang_up(*ends):
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
