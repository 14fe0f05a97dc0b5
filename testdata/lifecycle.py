#!/usr/bin/env python3
"""The design of settle (lifecycle.go) and of the operations (services.go) as a small program, checked exhaustively.

A world is one service: its containers (name, environment, volume), its bind directory, its mark, and its record (the
environment, the pending one, the revision). Operations are written as in the design, one step a call. At each step
the daemon may die before it, after it, or while the call is on its way: then the engine carries it out at any later
step. (Calls of the file system cannot be late.) All choices are tried, by replay.

    lifecycle.py [requests] [deaths] [late calls] [errors] [nature] [mutation]        default 3 1 1 0

With nature, two more requests are tried: a power cut, after which the engine knows what it knew at any earlier
moment, and a prune by hand. A mutation takes one line out of the design, and must be found: keep-candidate,
keep-current, mark-late, mark-early, record-left, no-repair, and with nature keep-revenant.
"""
import itertools
import sys
import time


class Dead(Exception):
    pass


class Failed(Exception):
    """The engine's error, or ours: the request is not answered with a success."""


class Choices:
    def __init__(self):
        self.path, self.at = [], 0

    def choose(self, n):
        if n == 1:
            return 0
        if self.at == len(self.path):
            self.path.append([0, n])
        self.at += 1
        return self.path[self.at - 1][0]

    def next(self):
        while self.path and self.path[-1][0] + 1 == self.path[-1][1]:
            self.path.pop()
        if not self.path:
            return False
        self.path[-1][0] += 1
        self.at = 0
        return True


class World:
    def __init__(self, choices, deaths, lates, errors=0, mutate=""):
        self.ch, self.deaths, self.lates, self.errors, self.mutate = choices, deaths, lates, errors, mutate
        self.c = {}          # id: dict(name, env, vol)
        self.vols = set()
        self.dir = None      # None, "empty", "part", "full"
        self.mark = False    # .incomplete/<id>
        self.record = None   # .services/<id>: (environment, pending environment or None, revision)
        self.late = []       # calls on their way
        self.past = []       # what the engine knew
        self.lost = False
        self.n = 0
        self.trace = []

    # -- one step: a call of the engine or of the file system
    def step(self, what, call, late=True):
        while self.late and self.ch.choose(2):
            name, pending = self.late.pop(0)
            self.trace.append(f"   late: {name}")
            try:
                pending()
            except Failed as e:
                self.trace.append(f"         which fails: {e}")
        kind = 0
        if self.errors and self.ch.choose(2):
            self.errors -= 1
            done = late and self.ch.choose(2)  # carried out, and only the answer is lost
            self.trace.append(f"   fails{', though carried out' if done else ''}: {what}")
            if done:
                call()
            raise Failed("502")
        if self.deaths:
            kind = self.ch.choose(4 if late and self.lates > 0 else 3)
        if kind:
            self.deaths -= 1
        if kind == 1:
            self.trace.append(f"   dies before {what}")
            raise Dead
        if kind == 3:
            self.lates -= 1
            self.trace.append(f"   dies, and on its way is {what}")
            self.late.append((what, call))
            raise Dead
        self.trace.append(f"   {what}")
        try:
            result = call()
        except Failed as e:
            self.trace.append(f"      which fails: {e}")
            if kind == 2:
                raise Dead
            raise
        if kind == 2:
            self.trace.append("   dies after it")
            raise Dead
        return result

    # -- the engine
    def named(self, name):
        return next((i for i, c in self.c.items() if c["name"] == name), None)

    def revise(self):
        self.revisions = getattr(self, "revisions", 0) + 1
        return f"r{self.revisions}"

    def make(self, env, revision, volume_of=None):
        vol_of = self.c[volume_of]["vol"] if volume_of in self.c else None

        def call():  # the engine has checked a late one before: the directory and the other container may be gone
            if self.named("candidate"):
                raise Failed("conflict")
            self.n += 1
            vol = vol_of or f"v{self.n}"
            self.vols.add(vol)
            self.c[self.n] = dict(name="candidate", env=env, revision=revision, vol=vol)
            return self.n
        if volume_of and not vol_of:
            raise Failed("no such container")
        return self.step(f"create candidate env={env} revision={revision}", call)

    def rename(self, i, name):
        def call():
            if i not in self.c:
                raise Failed("no such container")
            if self.named(name):
                raise Failed("conflict")
            self.c[i]["name"] = name
        self.step(f"rename {i} to {name}", call)

    def remove(self, i):
        def call():
            if i not in self.c:
                return
            vol = self.c.pop(i)["vol"]
            if not any(c["vol"] == vol for c in self.c.values()):
                self.vols.discard(vol)
        self.step(f"remove {i} with its volumes", call)

    def set(self, what, **fields):
        def call():
            for k, v in fields.items():
                setattr(self, k, v)
        self.step(what, call, late=False)

    # -- the daemon
    def settle(self):
        """The current container, if there is a service."""
        c = self.step("list", lambda: {i: dict(x) for i, x in self.c.items()}, late=False)
        name = {x["name"]: i for i, x in c.items()}
        cur, candidate = name.get("id"), name.get("candidate")
        if self.mark:
            if self.mutate == "mark-early":
                self.set("unmark", mark=False)
            for i in sorted(c):
                self.remove(i)
            self.set("erase the directory", dir=None)
            if self.mutate != "record-left":
                self.set("remove the record", record=None)
            self.set("unmark", mark=False)
            return None
        env, _, revision = self.record or (None, None, None)
        fits = candidate and (c[candidate]["revision"] == revision)
        if not self.record:  # a late call made the candidate; a power cut brought the container back
            if candidate and self.mutate != "keep-candidate":
                self.remove(candidate)
            if cur and self.dir is None and self.mutate != "keep-revenant":
                self.remove(cur)
            return None
        if cur and c[cur]["revision"] == revision:
            if candidate and self.mutate != "keep-candidate":
                self.remove(candidate)
            return cur
        if not cur and self.mutate == "no-repair":
            return None
        if candidate and not fits:
            self.remove(candidate)
        if not fits and self.record[1]:  # a container is made anyway, and perhaps only what is pending can be
            revision, env = self.revise(), self.record[1]
            self.set(f"write the record env={env}", record=(env, None, revision))
        if not fits:
            self.lost = self.lost or not cur  # its volumes: must not happen without nature
            candidate = self.make(env, revision, cur)
        if cur and self.mutate != "keep-current":
            self.remove(cur)
        self.rename(candidate, "id")
        return candidate

    def create(self, env):
        self.settle()
        if self.record:
            raise Failed("409")
        if self.dir not in (None, "empty"):
            raise Failed("409 data")
        if self.mutate != "mark-late":
            self.set("mark", mark=True)
        try:
            self.set("make the directory", dir="empty")
            if self.mutate == "mark-late":
                self.set("mark", mark=True)
            revision = self.revise()
            i = self.make(env, revision)
            self.set("unpack a part", dir="part")
            self.set("unpack the rest", dir="full")
            self.rename(i, "id")
            self.set(f"write the record env={env}", record=(env, None, revision))
            self.set("unmark", mark=False)  # the commit
        except Failed:
            try:
                self.settle()
            except Failed:
                pass  # logged; the next settling
            raise

    def patch(self, env):
        if self.mark or not self.record:  # the container may be missing, and the image: a PUT repairs that
            raise Failed("404")
        env_now, _, revision = self.record
        self.set(f"write the record env={env_now} pending={env}", record=(env_now, env, revision))  # the commit

    def restart(self, _):
        cur = self.settle()
        if not self.record:
            raise Failed("404")
        pending = self.record[1]
        if pending:
            revision = self.revise()
            self.make(pending, revision, cur)
            self.set(f"write the record env={pending}", record=(pending, None, revision))  # the commit
            self.settle()

    def delete(self, _):
        if not self.record and self.dir is None and not self.mark:
            raise Failed("404")
        self.set("mark", mark=True)  # the commit
        self.settle()

    def power(self, _):
        """A power cut: late calls are gone, and the engine knows what it knew earlier. Our files are unchanged."""
        at = self.past[self.ch.choose(len(self.past))]
        self.trace.append(f"   power cut; the engine is as at {at[0]}")
        self.c, self.vols, self.late = {i: dict(x) for i, x in at[1].items()}, set(at[2]), []
        self.settle()

    def prune(self, _):
        """docker container prune, by hand."""
        self.trace.append("   all containers are removed by hand")
        self.c = {}
        self.vols = set()

    # -- what a client may find
    def seen(self):
        return (None, None) if self.mark or not self.record else self.record[:2]


def after(state, op, env):
    """The state that a success leaves, or None if the request cannot succeed in it."""
    cur, nxt = state
    if op == "create":
        return (env, None) if cur is None else None
    if cur is None:
        return None
    return {"patch": (cur, env), "restart": (nxt or cur, None), "delete": (None, None)}[op]


def run(w, ops):
    may = {(None, None)}
    for k, op in enumerate(ops):
        if {"power", "prune"} & set(ops[:k]):  # a missing container is made from what is pending
            may |= {(nxt, None) for _, nxt in may if nxt}
        env = f"e{k}"
        quiet = not w.late
        w.trace.append(f"{op} {env}")
        w.past.append((k, {i: dict(x) for i, x in w.c.items()}, set(w.vols)))
        if op in ("power", "prune"):
            try:
                getattr(w, op)(env)
            except (Dead, Failed):
                pass
            continue
        try:
            getattr(w, op)(env)
            empty = {(None, None)} if op == "delete" else set()  # a delete of what an unfinished operation left
            may = {after(s, op, env) or (None, None) for s in may if after(s, op, env) or s[0] is None and empty}
            assert may, "a success that cannot be"
        except Failed as e:
            w.trace.append(f"   answered {e}")
            ok = str(e) in ("404", "409")
            refused = {s for s in may if after(s, op, env) is None}
            if ok and refused:
                may = refused
            else:
                assert not quiet or str(e) == "502", f"{op} failed with {e}, may {may}"
                may = may | ({after(s, op, env) for s in may} - {None})
        except Dead:
            may = may | ({after(s, op, env) for s in may} - {None})
            while True:
                try:
                    w.settle()
                    break
                except (Dead, Failed) as e:
                    if isinstance(e, Failed):
                        break  # the minute's round tries again
    w.errors = w.deaths = w.lates = 0
    w.trace.append("in the end")
    for _ in range(3):
        while w.late:
            name, pending = w.late.pop(0)
            w.trace.append(f"   late: {name}")
            try:
                pending()
            except Failed:
                pass
        try:
            w.settle()
        except Failed:
            pass
    if {"power", "prune"} & set(ops):  # a missing container is made from what is pending
        may |= {(nxt, None) for _, nxt in may if nxt}
    seen = w.seen()
    names = sorted(c["name"] for c in w.c.values())
    assert seen in may, f"the service is {seen}, may be {may}"
    assert not w.mark and names in ([], ["id"]), f"left: {names}, mark {w.mark}"
    if seen[0] is None:
        assert not names and w.dir is None and not w.record, f"left: {names} {w.dir} {w.record}"
        assert not w.vols, f"volumes left: {w.vols}"
    else:
        assert names == ["id"] and w.c[w.named("id")]["env"] == seen[0], f"the containers are {w.c}"
        assert w.dir == "full", f"the directory is {w.dir}"
        assert not w.lost or {"power", "prune"} & set(ops), "a volume is lost"
        assert w.c[w.named("id")]["vol"] in w.vols, "its volume is gone"
        assert len(w.vols) == 1, f"volumes left: {w.vols}"


def main():
    given = [int(a) for a in sys.argv[1:] if a.isdigit()]
    requests, deaths, lates, errors = given + [3, 1, 1, 0][len(given):]
    mutate = next((a for a in sys.argv[1:] if not a.isdigit() and a != "nature"), "")
    began, paths, bad, kinds = time.time(), 0, 0, {}
    requested = ["create", "patch", "restart", "delete"] + ["power", "prune"] * ("nature" in sys.argv)
    for ops in itertools.product(requested, repeat=requests):
        if ops[0] != "create":
            continue
        ch = Choices()
        while True:
            w = World(ch, deaths, lates, errors, mutate)
            paths += 1
            try:
                run(w, ops)
            except AssertionError as e:
                bad += 1
                kind = str(e).split(",")[0]
                kinds[kind] = kinds.get(kind, 0) + 1
                if kinds[kind] == 1:
                    print(f"{ops}: {e}\n" + "\n".join(w.trace), flush=True)
            if not ch.next():
                break
    print(kinds)
    print(f"model: {paths} histories of {requests} requests, {deaths} deaths, {lates} late calls, {errors} errors: "
          f"{bad} bad, {time.time() - began:.0f} s")
    return bad > 0


sys.exit(main())
