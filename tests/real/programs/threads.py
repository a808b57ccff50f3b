"""Threads, a queue between them, and a lock."""
import hashlib, os, queue, threading, time

work, done, lock = queue.Queue(maxsize=8), {}, threading.Lock()

def worker():
    while (item := work.get()) is not None:
        digest = str(item).encode()
        for _ in range(2000):
            digest = hashlib.sha256(digest).digest()
        time.sleep(0.002)
        with lock:
            done[item] = digest.hex()

threads = [threading.Thread(target=worker) for _ in range(6)]
for thread in threads:
    thread.start()
for item in range(1200):
    work.put(item)
    if item == 100:
        open("mid", "w").close()
while not os.path.exists("end"):
    time.sleep(0.01)
for _ in threads:
    work.put(None)
for thread in threads:
    thread.join()
with open("result", "w") as out:
    for item in sorted(done):
        print(item, done[item], file=out)
