"""A transaction that is open, with its locks and its journal."""
import os, sqlite3, time

base = sqlite3.connect("base.db", isolation_level=None)
base.execute("create table numbers (n integer primary key, text)")
base.execute("begin exclusive")
for number in range(400):
    base.execute("insert into numbers values (?, ?)", (number, "x" * (number % 97)))
    time.sleep(0.004)
    if number == 60:
        open("mid", "w").close()
while not os.path.exists("end"):
    time.sleep(0.01)
try:
    sqlite3.connect("base.db", timeout=0).execute("select count(*) from numbers")
    outside = "another connection got in"
except sqlite3.OperationalError as error:
    outside = str(error)
base.execute("commit")
sums = base.execute("select count(*), sum(n), sum(length(text)) from numbers").fetchone()
intact = base.execute("pragma integrity_check").fetchone()
open("result", "w").write(f"{outside} {sums} {intact}")
