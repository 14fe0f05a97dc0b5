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

	"github.com/docker/docker/client"
)

// disk is a file system in a file. What the kernel has only in its memory is not in that file, so
// that a copy of it, taken while the file system is in use, is what a power cut would leave.
type disk struct{ image, dir string }

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
	if err := cmp.Or(os.WriteFile(image, nil, 0o600), os.Truncate(image, 128<<20)); err != nil {
		t.Fatal(err)
	}
	command(t, "mkfs.ext4", "-q", "-b1024", "-I1024", "-N5000", "-Elazy_itable_init=0", diskKinds[kind].mkfs, image)
	return &disk{image, mountImage(t, image, diskKinds[kind].mount)}
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("this test makes file systems with mkfs.ext4, of e2fsprogs, in files, and mounts them, which takes root,\n"+
			"CAP_SYS_ADMIN and loop devices: %s %q: %v\n%s", name, args, err, out)
	}
}

// mountImage mounts a disk, or a copy of one, until the test ends.
func mountImage(t *testing.T, image, options string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	command(t, "mount", "-t", "ext4", "-o", options, image, dir)
	t.Cleanup(func() {
		// A process that another test just starts can still have a descriptor of what is there.
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func (d *disk) copyTo(image string) error {
	return exec.Command("cp", "--sparse=always", d.image, image).Run()
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
	image := filepath.Join(t.TempDir(), "image")
	if err := d.copyTo(image); err != nil {
		t.Fatal(err)
	}
	wantOnImage(t, image, want)
}

func wantOnImage(t *testing.T, image string, want tree) {
	t.Helper()
	dir := mountImage(t, image, "loop")
	got, all := tree{}, maps.Clone(want)
	for name, n := range readTree(t, dir, filepath.Join(dir, "lost+found")) {
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
		t.Errorf("after a power cut %d of %d paths are wrong:\n%s", len(wrong), len(all), strings.Join(wrong[:min(len(wrong), 5)], ""))
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

func TestFirstStartSurvivesAPowerCut(t *testing.T) {
	t.Parallel()
	for kind := range diskKinds {
		for i := range 4 {
			onTwo, anotherDied := i&1 != 0, i&2 != 0
			t.Run(fmt.Sprintf("%s, key and binds on two disks %v, after a start that died %v", kind, onTwo, anotherDied), func(t *testing.T) {
				t.Parallel()
				keys, wantKeys := newDisk(t, kind), tree{}
				binds, wantBinds := keys, wantKeys
				if onTwo { // so that a sync for the one does nothing for the other
					binds, wantBinds = newDisk(t, kind), tree{}
				}
				keyFile, root := filepath.Join(keys.dir, "corekey.bin"), filepath.Join(binds.dir, "lib", "binds")
				if anotherDied { // before it synced what it had made
					if err := cmp.Or(os.WriteFile(keyFile, make([]byte, 32), 0o600), os.MkdirAll(filepath.Join(root, goneDir), 0o700)); err != nil {
						t.Fatal(err)
					}
				}
				d := startDaemon(t, newFakeEngine(t).host(), func(c *config) { c.coreKeyPath, c.binds = keyFile, root })
				key, err := base64.StdEncoding.DecodeString(d.key)
				if err != nil || len(key) != 32 {
					t.Errorf("the key has %d bytes, %v, want 32", len(key), err)
				}
				wantKeys["corekey.bin"] = describePath(0o600, owner{}, string(key))
				wantBinds["lib"], wantBinds["lib/binds"], wantBinds["lib/binds/.gone"] = private, private, private
				for range 2 {
					keys.wantAfterCut(t, wantKeys)
					binds.wantAfterCut(t, wantBinds)
					d.do(t, "GET", "/service", "").want(t, http.StatusOK) // it is the key that the daemon uses
				}
			})
		}
	}
}

func TestAnswersSurviveAPowerCut(t *testing.T) {
	t.Parallel()
	for kind := range diskKinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			testPowerCuts(t, newDisk(t, kind))
		})
	}
}

// testPowerCuts takes steps. Each step's power cuts also leave what the steps before it were answered.
func testPowerCuts(t *testing.T, d *disk) {
	engine, err := client.NewClientWithOpts(client.FromEnv)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { engine.Close() })
	sockets, err := os.MkdirTemp("", "power") // t.TempDir's name can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	proxy := newDeathProxy(t, filepath.Join(sockets, "s"), engine)
	m := newMachine(t, func(c *config) {
		c.fetchAllow, c.binds, c.dockerHost = loopback, filepath.Join(d.dir, "binds"), "unix://"+proxy.socket
	})
	want := tree{"binds": private, "binds/.gone": private}
	bare, taken, full := newID(), newID(), newID()
	create := func(t *testing.T, id, extra, dir string) {
		m.createAs(t, id, extra).want(t, http.StatusCreated)
		want["binds/"+id] = dir
		d.wantAfterCut(t, want)
	}
	remove := func(t *testing.T, id string) {
		during := tree{}
		for name, what := range want {
			if below, its := strings.CutPrefix(name, "binds/"+id); its {
				delete(want, name)
				name = "binds/.gone/" + id + below
			}
			during[name] = what
		}
		image, copied := filepath.Join(t.TempDir(), "image"), make(chan error, 1)
		proxy.setHook(func(r *http.Request) (*http.Response, error) {
			if r.Method == http.MethodDelete && len(copied) == 0 {
				copied <- d.copyTo(image)
			}
			return proxy.transport.RoundTrip(r)
		})
		m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
		proxy.setHook(nil)
		d.wantAfterCut(t, want)
		select {
		case err := <-copied:
			if err != nil {
				t.Fatal(err)
			}
			wantOnImage(t, image, during) // it is on record that all has to go before the container does
		default:
			t.Error("the engine was not asked to remove the container")
		}
	}

	for _, step := range []struct {
		name string
		do   func(t *testing.T)
	}{
		{"create without contents", func(t *testing.T) { create(t, bare, "", public) }},
		{"create with a directory that is there", func(t *testing.T) {
			dir := filepath.Join(m.binds, taken)
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			command(t, "sync", dir, m.binds)
			create(t, taken, `"user":"1234:2345"`, theirs)
		}},
		{"create with contents", func(t *testing.T) {
			var entries []imageEntry
			for i := range 3001 {
				name, size := fmt.Sprintf("%d/%d", i%40, i), i
				if i == 3000 {
					name, size = "big", 24<<20
				}
				content := strings.Repeat(rand.Text(), size/26+1)[:size]
				entries = append(entries, imageFile(name, content))
				name = "binds/" + full + "/" + name
				want[path.Dir(name)], want[name] = theirs, describePath(0o755, owner{1234, 2345}, content)
			}
			url := serveArchives(t, map[string][]byte{"/a": gzipOf(t, imageOf(t, entries...))})
			create(t, full, fmt.Sprintf(`"user":"1234:2345","bind_contents":"%s/a"`, url), theirs)
		}},
		{"delete without contents", func(t *testing.T) { remove(t, taken) }},
		{"delete with contents", func(t *testing.T) { remove(t, full) }},
	} {
		if !t.Run(step.name, step.do) {
			t.Fatal("the steps after this one need it")
		}
	}
	m.do(t, "GET", "/service", "").want(t, http.StatusOK)
	d.wantAfterCut(t, want)
}
