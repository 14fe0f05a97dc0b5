//go:build integration

package main

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// disk is a file system in a file. What the kernel has only in its memory is not in that file, so
// that a copy of it, taken while the file system is in use, is what a power cut would leave.
type disk struct{ kind, image, dir string }

// On an ext4 with a journal a sync of any directory makes all durable but what is in files. On one
// without, it does that for the directory alone, and its name: POSIX promises no more. So that this
// shows, each inode has a block of its own.
var diskKinds = map[string]struct{ mkfs, mount string }{
	"with a journal":    {"-Jsize=32", "loop,commit=600"}, // room and time for all that a step does
	"without a journal": {"-O^has_journal", "loop"},
}

// newDisk makes an empty disk, to which the kernel writes nothing by the clock while a test runs.
func newDisk(t *testing.T, kind string) *disk {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	must(t, cmp.Or(os.WriteFile(image, nil, 0o600), os.Truncate(image, 128<<20)))
	command(t, "mkfs.ext4", "-q", "-b1024", "-I1024", "-N5000", "-Elazy_itable_init=0", diskKinds[kind].mkfs,
		image)
	d := &disk{kind, image, t.TempDir()}
	d.mount(t)
	return d
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("this test makes file systems with e2fsprogs, in files, and mounts them, which takes root,\n"+
			"CAP_SYS_ADMIN and loop devices: %s %q: %v\n%s", name, args, err, out)
	}
}

// mount mounts the disk until the test ends, over what is mounted there.
func (d *disk) mount(t *testing.T) {
	t.Helper()
	command(t, "mount", "-t", "ext4", "-o", diskKinds[d.kind].mount, d.image, d.dir)
	t.Cleanup(func() {
		// A process that another test just starts can still have a descriptor of what is there.
		if err := syscall.Unmount(d.dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// afterCut returns the disk as a power cut at this moment would leave it, not mounted.
func (d *disk) afterCut(t *testing.T) *disk {
	image := filepath.Join(t.TempDir(), "image")
	if out, err := exec.Command("cp", "--sparse=always", d.image, image).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	return &disk{d.kind, image, d.dir}
}

// The trees here have of each path what describePath says, without the content itself.
const (
	private = "drwx------ 0:0"
	public  = "drwxr-xr-x 0:0"
	theirs  = "drwxr-xr-x 1234:2345"
)

func describePath(mode fs.FileMode, o owner, content string) string {
	text := fmt.Sprintf("%v %d:%d", mode, o.uid, o.gid)
	if mode.IsRegular() {
		text += fmt.Sprintf(" %d bytes %x", len(content), sha256.Sum256([]byte(content)))
	}
	return text
}

// wantAfterCut fails the test unless a power cut at this moment leaves all of want, and nothing else.
func (d *disk) wantAfterCut(t *testing.T, want tree) {
	t.Helper()
	copied := d.afterCut(t)
	copied.dir = t.TempDir()
	copied.mount(t)
	copied.wantTree(t, want)
}

// wantTree fails the test unless a disk that was mounted after a power cut has all of want, and nothing else.
func (d *disk) wantTree(t *testing.T, want tree) {
	t.Helper()
	got, all := tree{}, maps.Clone(want)
	for name, n := range readTree(t, d.dir, filepath.Join(d.dir, "lost+found")) {
		if name != "." {
			got[name] = describePath(n.mode, owner{int(n.uid), int(n.gid)}, n.content)
			all[name] = ""
		}
	}
	var wrong []string
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if got[name] != want[name] {
			wrong = append(wrong, fmt.Sprintf("%s is %q, want %q\n", name, got[name], want[name]))
		}
	}
	if len(wrong) > 0 {
		t.Errorf("after a power cut %d of %d paths are wrong:\n%s", len(wrong), len(all),
			strings.Join(wrong[:min(len(wrong), 5)], ""))
	}
}

// The other power cuts would show nothing without this.
func TestPowerCutLeavesOnlyWhatWasSynced(t *testing.T) {
	t.Parallel()
	for kind := range diskKinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			d := newDisk(t, kind)
			content := strings.Repeat("content", 100_000)
			writeFile(t, filepath.Join(d.dir, "file"), content)
			d.wantAfterCut(t, tree{})
			command(t, "sync", filepath.Join(d.dir, "file"))
			d.wantAfterCut(t, tree{"file": describePath(0o644, owner{}, content)})
		})
	}
}

// emptyRoot is the tree of a bind root without a service.
var emptyRoot = tree{"binds": private, "binds/.services": private, "binds/.incomplete": private,
	"binds/.incomplete/.mark": describePath(0o600, owner{}, "")}

func TestFirstStartSurvivesAPowerCut(t *testing.T) {
	t.Parallel()
	for kind := range diskKinds {
		for i := range 4 {
			onTwo, anotherDied := i&1 != 0, i&2 != 0
			t.Run(fmt.Sprintf("%s, key and binds on two disks %v, after a start that died %v", kind, onTwo,
				anotherDied), func(t *testing.T) {
				t.Parallel()
				keys, wantKeys := newDisk(t, kind), tree{}
				binds, wantBinds := keys, wantKeys
				if onTwo { // so that a sync for the one does nothing for the other
					binds, wantBinds = newDisk(t, kind), tree{}
				}
				keyFile, root := filepath.Join(keys.dir, "corekey.bin"), filepath.Join(binds.dir, "lib", "binds")
				if anotherDied { // before it synced what it had made
					must(t, cmp.Or(os.WriteFile(keyFile, make([]byte, 32), 0o600),
						os.MkdirAll(filepath.Join(root, markDir), 0o700)))
				}
				d := startDaemon(t, newFakeEngine(t).host(), func(c *config) { c.coreKeyPath, c.binds = keyFile, root })
				key, err := base64.StdEncoding.DecodeString(d.key)
				if err != nil || len(key) != 32 {
					t.Errorf("the key has %d bytes, %v, want 32", len(key), err)
				}
				wantKeys["corekey.bin"] = describePath(0o600, owner{}, string(key))
				wantBinds["lib"] = private
				for name, what := range emptyRoot {
					wantBinds["lib/"+name] = what
				}
				for range 2 {
					keys.wantAfterCut(t, wantKeys)
					binds.wantAfterCut(t, wantBinds)
					d.do(t, "GET", "/service", "").want(t, http.StatusOK) // it is the key that the daemon uses
				}
			})
		}
	}
}

// After each answer the power is cut, and the next request goes to a daemon that was started on what that has
// left.
func TestAnswersSurviveAPowerCut(t *testing.T) {
	t.Parallel()
	for kind := range diskKinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			testPowerCuts(t, newDisk(t, kind))
		})
	}
}

// powerCuts are a daemon on a disk, an engine, and the paths that a power cut has to leave of the disk.
type powerCuts struct {
	disk   *disk
	engine *fakeEngine
	daemon *daemon
	want   tree
	ids    []string // of the services that exist
}

func (p *powerCuts) start(t *testing.T) {
	p.daemon = startDaemon(t, p.engine.host(), func(c *config) {
		c.fetchAllow, c.binds = loopback, filepath.Join(p.disk.dir, "binds")
	})
}

// services describes all services, and whether the engine has other containers.
func (p *powerCuts) services(t *testing.T) string {
	text := fmt.Sprintf("containers %q\n", p.engine.names())
	for _, id := range p.ids {
		text += p.daemon.do(t, "GET", "/service/"+id+"/params", "").want(t, http.StatusOK).body
		c, _ := p.engine.container(id)
		text += toJSON(t, []any{c.Name, c.Config, c.HostConfig.Mounts, c.HostConfig.Memory,
			c.HostConfig.PortBindings}) + "\n"
	}
	return text
}

// withRecords returns the paths that have to be on the disk now, with the records of all services.
func (p *powerCuts) withRecords(t *testing.T) tree {
	t.Helper()
	all := maps.Clone(p.want)
	for _, id := range p.ids {
		text, err := os.ReadFile(filepath.Join(p.daemon.binds, recordDir, id))
		must(t, err)
		all["binds/.services/"+id] = describePath(0o600, owner{}, string(text))
	}
	return all
}

// request makes a request, cuts the power, and starts a daemon on the copy of the disk. The engine is put
// back to before the request.
func (p *powerCuts) request(t *testing.T, method, path, body string, status int) {
	t.Helper()
	before := p.engine.now()
	p.daemon.do(t, method, path, body).want(t, status)
	left := p.disk.afterCut(t)
	answered := p.services(t)
	want := p.withRecords(t)
	must(t, p.daemon.stop())
	p.disk = left
	// A machine does this when it starts; the status is 1 if something was repaired. Without a journal it always
	// is.
	check := exec.Command("e2fsck", "-fy", left.image)
	if out, err := check.CombinedOutput(); check.ProcessState.ExitCode() != 0 &&
		check.ProcessState.ExitCode() != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	p.disk.mount(t)
	p.disk.wantTree(t, want)
	p.engine.cutPower(before)
	p.start(t)
	after := "" // several rounds, if the first one has failed
	if !poll(func() bool { after = p.services(t); return after == answered }) {
		t.Errorf("answered\n%safter a power cut\n%s", answered, after)
	}
}

// create has a service created, and its directory and contents be there after a power cut.
func (p *powerCuts) create(t *testing.T, id, extra, dir string) {
	t.Helper()
	p.ids = append(p.ids, id)
	p.want["binds/"+id] = dir
	p.request(t, "POST", "/service", createBodyJSON(id, extra), http.StatusCreated)
}

// remove deletes a service. When the engine is asked to remove the container, it is on record that all has to
// go.
func (p *powerCuts) remove(t *testing.T, id string) {
	t.Helper()
	during := p.withRecords(t)
	during["binds/.incomplete/"+id] = during["binds/.incomplete/.mark"]
	maps.DeleteFunc(p.want, func(name, _ string) bool {
		return name == "binds/"+id || strings.HasPrefix(name, "binds/"+id+"/")
	})
	p.ids = slices.DeleteFunc(p.ids, func(other string) bool { return other == id })
	var copied *disk
	p.engine.setIntercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodDelete && copied == nil {
			copied = p.disk.afterCut(t)
		}
		return false
	})
	p.request(t, "DELETE", "/service/"+id, "", http.StatusNoContent)
	p.engine.setIntercept(nil)
	copied.dir = t.TempDir()
	copied.mount(t)
	copied.wantTree(t, during)
}

func testPowerCuts(t *testing.T, d *disk) {
	p := &powerCuts{disk: d, engine: newFakeEngine(t), want: maps.Clone(emptyRoot)}
	p.engine.addImage("img:1")
	p.start(t)
	p.create(t, "bare", `"env":["A=1"],"max_ram":67108864,"port_map":{"80/tcp":{"HostPort":"8080"}}`, public)

	dir := filepath.Join(p.daemon.binds, "taken")
	must(t, os.Mkdir(dir, 0o700))
	command(t, "sync", dir, p.daemon.binds)
	p.create(t, "taken", `"user":"1234:2345"`, theirs)

	// What a start applies, and what a restart of a running service does.
	p.request(t, "PATCH", "/service/bare/env", `{"A":"2"}`, http.StatusNoContent)
	p.request(t, "POST", "/service/bare/ctl", `{"op":"start"}`, http.StatusNoContent)
	p.request(t, "PUT", "/service/bare", createBodyJSON("bare", `"env":["A=3"],"max_ram":134217728`),
		http.StatusNoContent)
	p.request(t, "PATCH", "/service/bare/env", `{"A":"4"}`, http.StatusNoContent)
	p.daemon.do(t, "POST", "/service/taken/ctl", `{"op":"start"}`).want(t, http.StatusNoContent)
	p.request(t, "POST", "/service/bare/ctl", `{"op":"restart"}`, http.StatusNoContent)
	p.request(t, "POST", "/service/bare/ctl", `{"op":"restart"}`, http.StatusNoContent)
	p.remove(t, "taken")

	var entries []entry
	for i := range 3001 {
		name, size := fmt.Sprintf("%d/%d", i%40, i), i
		if i == 3000 {
			name, size = "big", 24<<20
		}
		content := strings.Repeat(rand.Text(), size/26+1)[:size]
		entries = append(entries, imageFile(name, content))
		name = "binds/full/" + name
		p.want[path.Dir(name)], p.want[name] = theirs, describePath(0o755, owner{1234, 2345}, content)
	}
	url := serveArchives(t, map[string][]byte{"/a": gzipped(archiveOf(entries...))})
	p.create(t, "full", fmt.Sprintf(`"user":"1234:2345","bind_contents":"%s/a"`, url), theirs)
	p.remove(t, "full")
	p.daemon.do(t, "POST", "/service/bare/ctl", `{"op":"start"}`).want(t, http.StatusNoContent)
}
