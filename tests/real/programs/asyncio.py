"""Coroutines that sleep, wait for each other and read from a child."""
import asyncio as aio, os, sys, time

class Pipeless(aio.SelectorEventLoop):
    """An event loop that nobody wakes from another thread: it needs no pair of sockets for that."""
    def _make_self_pipe(self):
        self._ssock = self._csock = None
        self._internal_fds += 1
    def _close_self_pipe(self):
        self._internal_fds -= 1

lines = []

async def ticker(name, pause, count, queue):
    for number in range(count):
        await aio.sleep(pause)
        await queue.put((name, number))

async def main():
    queue, ends = aio.Queue(), []
    tickers = [aio.create_task(ticker(f"t{n}", 0.002 * (n + 1), 600 // (n + 1), queue)) for n in range(5)]
    reading, writing = os.pipe()
    aio.get_running_loop().add_reader(reading, lambda: ends.append(os.read(reading, 1)))
    seen = {}
    begin = time.monotonic()
    while not all(task.done() for task in tickers) or not queue.empty():
        name, number = await aio.wait_for(queue.get(), 600)
        assert number == seen.get(name, -1) + 1, (name, number)
        seen[name] = number
        if name == "t0" and number == 60:
            open("mid", "w").close()
    while not os.path.exists("end"):
        await aio.sleep(0.01)
    os.write(writing, b"x")
    while not ends:
        await aio.sleep(0.01)
    assert ends == [b"x"] and time.monotonic() > begin
    lines.append(repr(sorted(seen.items())))

loop = Pipeless() if sys.argv[1] == "pipeless" else aio.new_event_loop()
loop.run_until_complete(main())
open("result", "w").write("\n".join(lines))
