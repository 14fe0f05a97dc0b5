//go:build integration

package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/client"
)

// What never reaches the engine, a fake engine shows. This is about what a real one makes of what reaches it.
func TestRealEngineKeepsOnlyImportsThatSucceed(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	marker := newID()
	archive := string(archiveOf(imageFile(marker, strings.Repeat(marker, 2000))))
	unpackable := string(archiveOf(imageFile(marker, marker), hardLink("link", "nothing")))
	m.do(t, "POST", "/docker/image", unpackable).want(t, http.StatusBadRequest, `"archive_refused"`)
	m.do(t, "POST", "/docker/image", archive[:len(archive)-1024]).want(t, http.StatusBadRequest)
	m.breakOff(t, archive, 20_000)
	m.breakOff(t, archive, len(archive)-1024)

	// An image of one of those would be complete by the time that these are.
	var good []string
	for _, body := range []string{archive, string(archiveOf(imageFile("other", marker)))} {
		id := m.importImage(t, body)
		m.cleanUp(t, m.binds, id)
		good = append(good, id)
		inspected, err := m.engine.ImageInspect(t.Context(), id)
		if want := []string{"duxcore/import:" + id[len("sha256:"):][:12]}; err != nil ||
			!slices.Equal(inspected.RepoTags, want) {
			t.Errorf("the image's tags are %q, %v, want %q", inspected.RepoTags, err, want)
		}
	}
	holding := m.holding(t, marker)
	for _, id := range holding {
		m.cleanUp(t, m.binds, id)
	}
	slices.Sort(good)
	if slices.Sort(holding); !slices.Equal(holding, good) {
		t.Errorf("the images %q hold what was uploaded, want %q", holding, good)
	}
}

// holding returns the ids of the images made by importing something with marker in it.
func (m *machine) holding(t testing.TB, marker string) (ids []string) {
	t.Helper()
	for _, found := range allImages(t, m.engine) {
		// Larger or older ones are not this test's. Others' images may go meanwhile.
		if found.Size > 1<<20 || time.Since(time.Unix(found.Created, 0)) > time.Hour {
			continue
		}
		saved, err := m.engine.ImageSave(t.Context(), []string{found.ID})
		if err != nil {
			continue
		}
		text, err := inLayers(saved)
		saved.Close()
		if err == nil && strings.Contains(text, marker) {
			ids = append(ids, found.ID)
		}
	}
	return ids
}

// allImages lists the engine's images. With containerd's store that is a 404 while another test removes one.
func allImages(t testing.TB, engine *client.Client) (all []image.Summary) {
	t.Helper()
	waitFor(t, "a list of images", func() bool {
		var err error
		all, err = engine.ImageList(context.Background(), image.ListOptions{All: true})
		if err != nil && !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
		return err == nil
	})
	return all
}

// inLayers returns the names and contents of all files in the layers of a saved image: archives in
// an archive, which some engines compress.
func inLayers(saved io.Reader) (string, error) {
	var all strings.Builder
	outer := tar.NewReader(saved)
	for {
		if _, err := outer.Next(); err == io.EOF {
			return all.String(), nil
		} else if err != nil {
			return "", err
		}
		blob := bufio.NewReader(outer)
		layer := tar.NewReader(blob)
		if start, _ := blob.Peek(2); string(start) == "\x1f\x8b" {
			unzipped, err := gzip.NewReader(blob)
			if err != nil {
				return "", err
			}
			layer = tar.NewReader(unzipped)
		}
		for header, err := layer.Next(); err == nil; header, err = layer.Next() { // its end, or no archive
			all.WriteString(header.Name)
			io.Copy(&all, layer)
		}
	}
}

// breakOff uploads the first bytes of an archive, closes the connection, and waits until
// the daemon is done with it.
func (m *machine) breakOff(t testing.TB, archive string, bytes int) {
	t.Helper()
	const line = `route="POST /docker/image"`
	before := strings.Count(m.log.String(), line)
	conn := wireDial(t, m.daemon)
	head := m.head("POST /docker/image") + fmt.Sprintf("Content-Length: %d\r\n\r\n", len(archive))
	io.WriteString(conn, head+archive[:bytes])
	must(t, conn.Close())
	waitFor(t, "the end of the upload", func() bool { return strings.Count(m.log.String(), line) > before })
}

// loadImage gives the engine an image with any configuration, and returns its name.
func (m *machine) loadImage(t testing.TB, config string) string {
	t.Helper()
	name := "duxcore-test/" + newID() + ":1"
	layer := string(archiveOf(imageFile("probe", buildProbe(t))))
	sum := sha256.Sum256([]byte(layer))
	image := fmt.Sprintf(`{"architecture":%q,"os":"linux","config":%s,"rootfs":{"type":"layers",`+
		`"diff_ids":["sha256:%x"]}}`,
		runtime.GOARCH, config, sum)
	manifest := fmt.Sprintf(`[{"Config":"config.json","RepoTags":[%q],"Layers":["layer.tar"]}]`, name)
	answer, err := m.engine.ImageLoad(t.Context(), bytes.NewReader(archiveOf(
		imageFile("manifest.json", manifest), imageFile("config.json", image), imageFile("layer.tar", layer))))
	must(t, err)
	defer answer.Body.Close()
	m.cleanUp(t, m.binds, name)
	if text, err := io.ReadAll(answer.Body); err != nil || !bytes.Contains(text, []byte(name)) {
		t.Fatalf("cannot load: %s %v", text, err)
	}
	return name
}

// What an image says of itself, its services do not get by that.
func TestImagesThatAskForMore(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	for name, config := range map[string]string{
		"a megabyte of labels":             `{"Labels":{"a":"` + strings.Repeat("x", 1<<20) + `"}}`,
		"a working directory of runtime's": `{"WorkingDir":"/proc/self/fd/8"}`,
	} {
		t.Run(name, func(t *testing.T) {
			m.createAs(t, newID(), fmt.Sprintf(`"image":%q`, m.loadImage(t, config))).want(t, http.StatusBadRequest,
				"image: ")
			m.wantNothing(t)
		})
	}
	t.Run("the beginning of another's id", func(t *testing.T) {
		for _, prefix := range []string{m.image[7:9], m.image[7:70], m.image[:20]} {
			m.createAs(t, newID(), fmt.Sprintf(`"image":%q`, prefix)).want(t, http.StatusBadRequest, "image: ")
		}
		m.wantNothing(t)
	})
	t.Run("variables", func(t *testing.T) {
		ref := m.loadImage(t, `{"Env":["KEPT=1","TAKEN=2"]}`)
		id := m.create(t, fmt.Sprintf(`"image":%q,"env":["TAKEN","OWN=3"]`, ref))
		m.ctl(t, id, "start")
		env := m.report(t, id).Env
		slices.Sort(env)
		if text := strings.Join(env, " "); !strings.Contains(text, "KEPT=1") || !strings.Contains(text, "OWN=3") ||
			strings.Contains(text, "TAKEN") {
			t.Errorf("it has %s", text)
		}
		m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
	})
	t.Run("a health check", func(t *testing.T) {
		ref := m.loadImage(t, `{"Healthcheck":{"Test":["CMD","/probe","run","/data"],"Interval":1}}`)
		id := m.create(t, fmt.Sprintf(`"image":%q`, ref))
		m.ctl(t, id, "start")
		m.setEnv(t, id, `{"A":"1"}`)
		m.ctl(t, id, "restart") // another container
		if c := m.get(t, id); !c.State.Running || c.State.Health != nil {
			t.Errorf("it runs: %v; its health is %+v", c.State.Running, c.State.Health)
		}
		m.do(t, "DELETE", "/service/"+id, "").want(t, http.StatusNoContent)
	})
}

// registry is the least that the engine needs to pull from, for someone with a secret.
type registry struct {
	address string
	objects map[string]blob
}

// blob is a manifest or other content, by the path's last element.
type blob struct{ kind, content string }

func newRegistry(t testing.TB) *registry {
	r := &registry{objects: map[string]blob{}}
	server := httptest.NewServer(r)
	t.Cleanup(server.Close)
	r.address = strings.TrimPrefix(server.URL, "http://")
	return r
}

func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if user, password, _ := req.BasicAuth(); user != "someone" || password != "secret" {
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
		return
	}
	object, ok := r.objects[req.URL.Path[strings.LastIndex(req.URL.Path, "/")+1:]]
	if req.URL.Path != "/v2/" && !ok {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		io.WriteString(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown","detail":{}}]}`)
		return
	}
	w.Header().Set("Content-Type", object.kind)
	w.Header().Set("Docker-Content-Digest", digest(object.content))
	w.Header().Set("Content-Length", strconv.Itoa(len(object.content)))
	io.WriteString(w, object.content)
}

func digest(content string) string { return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(content))) }

func (r *registry) add(kind, content string) map[string]any {
	r.objects[digest(content)] = blob{kind, content}
	return map[string]any{"mediaType": kind, "digest": digest(content), "size": len(content)}
}

// push puts an image of the layers, which are tar archives, under a tag. It returns the
// image's name and its layers' digests.
func (r *registry) push(t testing.TB, tag string, layers ...[]byte) (name string, digests []string) {
	t.Helper()
	var diffs []string
	var descriptors []any
	for _, layer := range layers {
		diffs = append(diffs, digest(string(layer)))
		zipped := string(gzipped(layer))
		digests = append(digests, digest(zipped))
		descriptors = append(descriptors, r.add("application/vnd.docker.image.rootfs.diff.tar.gzip", zipped))
	}
	const manifest = "application/vnd.docker.distribution.manifest.v2+json"
	config := r.add("application/vnd.docker.container.image.v1+json", toJSON(t, map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Cmd": []string{"/probe", "run", "/data"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffs}}))
	r.objects[tag] = blob{manifest, toJSON(t, map[string]any{"schemaVersion": 2, "mediaType": manifest,
		"config": config, "layers": descriptors})}
	r.add(manifest, r.objects[tag].content) // the engine asks for the tag, then for what it means
	return r.address + "/duxcore-test/probe:" + tag, digests
}

func TestImageIsPulledFromARegistry(t *testing.T) {
	t.Parallel()
	m := newMachine(t, nil)
	r := newRegistry(t)
	ref, _ := r.push(t, "good", archiveOf(imageFile("probe", buildProbe(t))), archiveOf(imageFile(newID(), "")))
	lacking, layers := r.push(t, "lacking", archiveOf(imageFile(newID(), "")), archiveOf(imageFile(newID(), "")))
	delete(r.objects, layers[1])
	const login = `{"username":"someone","password":"secret"}`
	for _, test := range []struct {
		ref, auth string
		status    int
		says      string // a pattern of what 20.10 says, and later engines
	}{
		{r.address + "/duxcore-test/probe:missing", login, http.StatusNotFound, "missing"},
		{lacking, login, http.StatusBadGateway, "unknown|from remote: not found"},
		{ref, "", http.StatusBadGateway, "no basic auth|unauthorized"},
		{ref, `{"username":"someone","password":"guess"}`, http.StatusBadGateway, "auth|401 Unauthorized"},
	} {
		m.cleanUp(t, m.binds, test.ref)
		answer := m.createFrom(t, newID(), test.ref, test.auth).want(t, test.status)
		if !regexp.MustCompile(test.says).MatchString(answer.body) || strings.Contains(answer.body, "guess") {
			t.Errorf("body %s, want %s in it", answer.body, test.says)
		}
		if _, err := m.engine.ImageInspect(t.Context(), test.ref); !errdefs.IsNotFound(err) {
			t.Errorf("the image %s: %v", test.ref, err)
		}
		m.wantNothing(t)
	}
	id := newID()
	m.createFrom(t, id, ref, login).want(t, http.StatusCreated)
	m.ctl(t, id, "start")
	if args := m.report(t, id).Args; !slices.Equal(args, []string{"/probe", "run", "/data"}) {
		t.Errorf("the service runs %q, want the image's command", args)
	}
}

// createFrom asks for a service of an image to be pulled, with its own command.
func (m *machine) createFrom(t testing.TB, id, ref, auth string) answer {
	t.Helper()
	r := m.request(t, "POST", "/service", strings.NewReader(createBodyJSON(id, fmt.Sprintf(`"image":%q`, ref))))
	r.Header.Set("X-Registry-Auth", base64.URLEncoding.EncodeToString([]byte(auth)))
	return m.send(t, r)
}
