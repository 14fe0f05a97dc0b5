//go:build integration

package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestBindContentsArriveInTheService(t *testing.T) {
	t.Parallel()
	archive := tgz(
		entry{name: "dir/", kind: '5', mode: 0o750, uid: 7, gid: 8}, imageFile("dir/program", "contents"),
		entry{name: "link", kind: '2', link: "dir/program", uid: 7, gid: 8})
	url := serveArchives(t, map[string][]byte{"/a.tar.gz": archive})
	m := newMachine(t, func(c *config) { c.fetchAllow = loopback })

	for user, owner := range map[string]string{"1234:2345": "1234:2345", "1234": "1234:0", "": "7:8"} {
		t.Run("user "+user, func(t *testing.T) {
			t.Parallel()
			id := m.create(t, fmt.Sprintf(`"user":%q,"bind_contents":"%s/a.tar.gz"`, user, url))
			m.ctl(t, id, "start")
			files := m.report(t, id).Files
			for name, want := range map[string]string{"dir": "drwxr-x--- ", "dir/program": "-rwxr-xr-x contents",
				"link": "Lrwxrwxrwx "} {
				if want = owner + " " + want; files[name] != want {
					t.Errorf("%s: the service sees %q, want %q", name, files[name], want)
				}
			}
		})
	}
}

func TestDeeplyNestedTreeIsDeleted(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	levels := map[bool]int{true: 10_000, false: 60_000}[raceDetector()]
	id := m.create(t, fmt.Sprintf(`"cmd":["/probe","nest","/data","%d"]`, levels))
	m.ctl(t, id, "start")
	if code := m.waitForEnd(t, id); code != 0 {
		t.Fatalf("the probe ended with %d", code)
	}
	m.client.Timeout = 0 // a busy disk takes minutes
	m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
	m.wantNothing(t)
}

func TestDeleteNeverFollowsALinkThatACustomerSwapsIn(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	canary := t.TempDir()
	inside := map[string]string{"top": "intact", "sub/f1": "intact", "sub/deep/f2": "intact"}
	for name, content := range inside {
		writeFile(t, filepath.Join(canary, name), content)
	}
	relative, err := filepath.Rel(filepath.Join(m.binds, "id"), canary)
	must(t, err)
	for i, target := range slices.Repeat([]string{canary, relative}, 5) {
		t.Run(fmt.Sprintf("round %d", i), func(t *testing.T) {
			t.Parallel()
			id := m.create(t, fmt.Sprintf(`"cmd":["/probe","swap","/data",%q]`, target))
			m.ctl(t, id, "start")
			m.report(t, id)
			m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
			if _, err := os.Lstat(filepath.Join(m.binds, id)); !os.IsNotExist(err) {
				t.Errorf("the bind directory: %v", err)
			}
			for name, content := range inside {
				wantFile(t, filepath.Join(canary, name), content)
			}
		})
	}
}

// A deleted customer's data must not appear in the next customer's service.
func TestMovedBindRootGivesNobodyAnothersData(t *testing.T) {
	t.Parallel()
	for name, move := range map[string]func(t *testing.T, binds string){
		"to another file system, with a link left": func(t *testing.T, binds string) {
			disk := t.TempDir()
			mountTmpfs(t, disk, "size=1m")
			command(t, "cp", "-a", binds, disk+"/binds")
			must(t, cmp.Or(os.RemoveAll(binds), os.Symlink(disk+"/binds", binds)))
		},
		"under a disk that is mounted over it": func(t *testing.T, binds string) {
			disk := t.TempDir()
			command(t, "cp", "-a", binds, disk+"/binds")
			mountTmpfs(t, binds, "size=1m")
			command(t, "cp", "-a", disk+"/binds/.", binds)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, nil)
			id := m.create(t, "")
			writeFile(t, filepath.Join(m.binds, id, "secret"), "the first customer's")
			move(t, m.binds)
			for _, request := range []struct{ method, path, body string }{
				{"DELETE", "/service/" + id, ""}, {"POST", "/service", createBodyJSON(newID(), "")},
				{"PUT", "/service/" + id, createBodyJSON(id, fmt.Sprintf(`"image":%q`, m.image))},
				{"PATCH", "/service/" + id + "/env", "{}"},
				{"POST", "/service/" + id + "/ctl", `{"op":"start"}`},
				{"POST", "/service/" + id + "/ctl", `{"op":"stop"}`},
				{"POST", "/service/" + id + "/ctl", `{"op":"restart"}`},
				{"POST", "/service/" + id + "/ctl", `{"op":"kill"}`}, {"GET", "/health", ""},
			} {
				m.do(t, request.method, request.path, request.body).want(t, http.StatusServiceUnavailable,
					"bind_root_moved")
			}
			must(t, m.stop())
			m.daemon = startDaemon(t, "", func(c *config) { c.binds = m.binds })
			m.ctl(t, id, "start")
			if files := m.report(t, id).Files; !strings.HasSuffix(files["secret"], "the first customer's") {
				t.Errorf("the service has lost its data: %q", files)
			}
			m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
			m.createAs(t, id, "").want(t, http.StatusCreated)
			m.ctl(t, id, "start")
			if files := m.report(t, id).Files; files["secret"] != "" {
				t.Errorf("the next service reads %q", files)
			}
			m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
		})
	}
}

// A customer fills the first level of its directory, so that it has no room for one name more, and
// then the disk; and so may the root have no room for one.
func TestFullDiskCanBeEmptied(t *testing.T) {
	t.Parallel()
	d := newDisk(t, "with a journal")
	m := newMachine(t, func(c *config) { c.binds = filepath.Join(d.dir, "binds") })
	id := m.create(t, "")
	dir := filepath.Join(m.binds, id)
	for i := range 100 {
		must(t, os.MkdirAll(fmt.Sprintf("%s/%0200d/is/not/empty", dir, i), 0o755))
	}
	full := func(what string, more func(i int) error) {
		for i := range 1 << 20 {
			err := more(i)
			if errors.Is(err, syscall.ENOSPC) {
				return
			}
			must(t, err)
		}
		t.Fatalf("%s is never full", what)
	}
	file, err := os.Create(dir + "/file")
	must(t, err)
	defer file.Close()
	full("the disk", func(int) error { _, err := file.Write(make([]byte, 1<<10)); return err })
	// A short link stands in the directory alone.
	full("the root", func(i int) error { return os.Symlink("x", fmt.Sprintf("%s/%d", m.binds, i)) })
	full("the directory", func(i int) error { return os.Symlink("x", fmt.Sprintf("%s/%d", dir, i)) })

	m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
	for _, name := range bindDirs(t, m.binds) {
		if strings.Contains(name, id) {
			t.Errorf("there is %s", name)
		}
	}
	m.do(t, "DELETE", "/service/"+m.create(t, ""), "").want(t, http.StatusNoContent)
}
