"""Arrays, with the threads of the linear algebra library behind them."""
import os, sys
sys.path = [entry for entry in sys.path if entry not in ("", os.getcwd())]
import hashlib, time
import numpy as np

state = np.random.default_rng(7)
matrix = state.random((300, 300))
for step in range(150):
    matrix = matrix @ matrix
    matrix /= np.abs(matrix).max()
    matrix += state.random((300, 300))
    time.sleep(0.01)
    if step == 20:
        open("mid", "w").close()
while not os.path.exists("end"):
    time.sleep(0.01)
open("result", "w").write(hashlib.sha256(np.round(matrix, 6).tobytes()).hexdigest())
