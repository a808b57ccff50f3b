"""A parent that talks with children through pipes."""
import os, subprocess, sys, time

CHILD = """
import sys
total = 0
for line in sys.stdin:
    total += int(line)
    print(total, flush=True)
sys.exit(total % 256)
"""
children = [
    subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(3)
]
lines = []
for number in range(250):
    for child in children:
        child.stdin.write(f"{number}\n")
        child.stdin.flush()
    lines.append(" ".join(child.stdout.readline().strip() for child in children))
    time.sleep(0.005)
    if number == 30:
        open("mid", "w").close()
while not os.path.exists("end"):
    time.sleep(0.01)
for child in children:
    child.stdin.close()
    lines.append(str(child.wait()))
open("result", "w").write("\n".join(lines))
