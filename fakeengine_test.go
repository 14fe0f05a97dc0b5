package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/mount"
	"github.com/docker/docker/api/types/system"
	"github.com/docker/docker/api/types/versions"
	"github.com/docker/docker/pkg/stdcopy"
)

var dialectName = flag.String("dialect", "20.10", "of the fake engine: 20.10, or 29")

// dialect is what one Docker Engine does and says otherwise than others, as recorded from it. The
// texts are formats; which values they take, their uses say.
type dialect struct {
	oldest, newest string   // versions of its API
	parts          []string // the components that it says it has
	containerd     bool     // keeps images in containerd's store

	notRunning, isRunning, noCommand, noStream string
	portTaken, cannotUnpack                    string
	noSuchRemote, noSuchLayer                  string
}

var dialects = map[string]dialect{
	"20.10": {
		oldest: "1.12", newest: "1.41", parts: []string{"Engine", "containerd", "runc", "docker-init"},

		notRunning: "Container %s is not running",
		isRunning: "You cannot remove a running container %s. Stop the container before attempting removal or " +
			"force remove",
		noCommand: "No command specified",
		noStream:  "Bad parameters: you must choose at least one stream",
		portTaken: "driver failed programming external connectivity on endpoint %s (%s): " +
			"Error starting userland proxy: listen tcp4 %s: bind: address already in use",
		cannotUnpack: "Error processing tar file(exit status 1): link /%[2]s /%[3]s: no such file or directory",
		noSuchRemote: "manifest for %[1]s not found: manifest unknown: manifest unknown",
		noSuchLayer:  "unknown blob",
	},
	// With the containerd store, and the minimum of its API that 29.0 to 29.2 have; it is 1.40 since.
	"29": {
		oldest: "1.44", newest: "1.55", parts: []string{"Engine", "containerd", "runc", "docker-init"},
		containerd: true,

		notRunning: "container %s is not running",
		isRunning: "cannot remove container %q: container is running: stop the container before removing or " +
			"force remove",
		noCommand: "no command specified",
		noStream:  "must specify at least one of 'stdout' or 'stderr'",
		portTaken: "failed to set up container networking: driver failed programming external connectivity on " +
			"endpoint %s (%s): " +
			"failed to bind host port %s/tcp: address already in use",
		cannotUnpack: `failed to unpack image: apply layer error for "docker.io/%[1]s": failed to extract layer ` +
			`sha256:9da81898463af22193ba926f70125b977c8acadede3b47dfc007dbca08ee742b: ` +
			"mount callback failed on /var/lib/docker/containerd/daemon/tmpmounts/containerd-mount2968991025: link " +
			"/var/lib/docker/containerd/daemon/tmpmounts/containerd-mount2968991025/%[2]s " +
			"/var/lib/docker/containerd/daemon/tmpmounts/containerd-mount2968991025/%[3]s: no such file or directory",
		noSuchRemote: "failed to resolve reference %[1]q: %[1]s: not found",
		noSuchLayer: "failed to copy: httpReadSeeker: failed open: could not fetch content descriptor " +
			"sha256:73a73feb93a23988048d93f81712f96be3ff22e4fdec9a9a254db006516428c9 " +
			"(application/vnd.docker.image.rootfs.diff.tar.gzip) from remote: not found",
	},
}

// fakeEngine is a stateful Docker Engine that answers in one of the dialects, on a unix socket.
// A call that it does not know fails the test; any call that copies files does.
type fakeEngine struct {
	t      testing.TB
	socket string

	mu         sync.Mutex
	server     *http.Server
	dialect    dialect
	recorded   []string
	answering  map[string]int // how many calls are being answered, by their path's end
	intercept  func(http.ResponseWriter, *http.Request) bool
	containers []*fakeContainer // in order of creation
	images     []*fakeImage
	dataRoot   string
	volumes    map[string]bool // anonymous ones: each container has one, as if each image asked for it
	remote     map[string]bool // images that a pull finds; false: and of which a layer is missing
	taken      string          // a host port that another program has
	frames     int             // of statistics sent so far
	closed     bool
	attaches   int           // so far
	changed    chan struct{} // closed when a container has printed, read, started, ended or gone
}

type fakeContainer struct {
	ID, Name   string // without the slash
	Labels     map[string]string
	Running    bool
	Config     container.Config
	HostConfig container.HostConfig
	mounts     []container.MountPoint
	volume     string
	imageID    string
	started    bool // once at least
	startedAt  string
	output     []fakeOutput
	deaf       bool // does not read its stdin
	stdin      []fakeInput
	tty        string // its size, as "24x80"
}

// fakeOutput is what a container printed in one go.
type fakeOutput struct {
	stream stdcopy.StdType
	text   string
}

// fakeInput is what a container read in one go.
type fakeInput struct {
	attach int // which of the attaches it came through
	text   string
}

type fakeImage struct {
	id   string
	tags []string
	cmd  []string
	user string
}

func newFakeEngine(t testing.TB) *fakeEngine {
	t.Helper()
	dir, err := os.MkdirTemp("", "engine") // t.TempDir's name can be too long for a socket
	must(t, err)
	e := bareFakeEngine(t)
	e.dataRoot = t.TempDir()
	e.socket = filepath.Join(dir, "s")
	e.reopen()
	t.Cleanup(func() { e.close(); os.RemoveAll(dir) })
	return e
}

// bareFakeEngine returns one that listens nowhere.
func bareFakeEngine(t testing.TB) *fakeEngine {
	return &fakeEngine{t: t, dialect: dialects[*dialectName], changed: make(chan struct{}),
		answering: map[string]int{}, volumes: map[string]bool{}, remote: map[string]bool{}}
}

func (e *fakeEngine) host() string { return "unix://" + e.socket }

// close makes the socket vanish and breaks off what is under way.
func (e *fakeEngine) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	e.change()
	e.server.Close()
}

// change wakes all that wait for a change. The caller holds the mutex.
func (e *fakeEngine) change() {
	close(e.changed)
	e.changed = make(chan struct{})
}

func (e *fakeEngine) reopen() {
	listener, err := net.Listen("unix", e.socket)
	if err != nil {
		e.t.Fatal(err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = false
	e.server = &http.Server{Handler: e}
	go e.server.Serve(listener) // ends with close
}

// calls returns what was asked so far, as "METHOD /path?query", but for what asks for its version.
func (e *fakeEngine) calls() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.recorded)
}

// wantAnswered waits until no call whose path ends so is being answered: the daemon holds no stream open.
func (e *fakeEngine) wantAnswered(t testing.TB, end string) {
	t.Helper()
	waitFor(t, "the end of the engine's answers to "+end, func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.answering[end] == 0
	})
}

// setIntercept has f called before each such call. It returns true where it has answered itself.
func (e *fakeEngine) setIntercept(f func(http.ResponseWriter, *http.Request) bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.intercept = f
}

// answerWith has each call whose path has an end answered with a text, which is JSON if it is whole.
func (e *fakeEngine) answerWith(end string, status int, text string) {
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, end) {
			return false
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		io.WriteString(w, text)
		return true
	})
}

// wantAskedNothing fails unless all that was asked so far had been asked before.
func (e *fakeEngine) wantAskedNothing(t testing.TB, before int) {
	t.Helper()
	if asked := e.calls()[before:]; len(asked) > 0 {
		t.Errorf("the engine was asked %q", asked)
	}
}

// setDialect has another engine take this one's place, with all that it has.
func (e *fakeEngine) setDialect(d dialect) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.dialect = d
}

// addImage adds an image with a command, or returns the one that has the name.
func (e *fakeEngine) addImage(name string) (id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if found := e.findImage(name); found != nil {
		return found.id
	}
	return e.newImage(name, []string{"/run"}).id
}

func (e *fakeEngine) removeImages() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.images = nil
	clear(e.remote)
}

// addRemote lets a pull of name succeed, or begin and fail when it comes to a layer.
func (e *fakeEngine) addRemote(name string, whole bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.remote[tagged(name)] = whole
}

// takePort has another program listen at a host port.
func (e *fakeEngine) takePort(port string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.taken = port
}

// addForeign adds a running container that somebody else made, and that mounts directories of the host.
func (e *fakeEngine) addForeign(name string, labels map[string]string, mounts ...string) (id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := &fakeContainer{ID: randomHex(), Name: name, Labels: labels, Running: true, started: true,
		imageID: "sha256:" + randomHex()}
	c.Config.Labels = labels
	for _, dir := range mounts {
		c.mounts = append(c.mounts, container.MountPoint{Type: mount.TypeBind, Source: dir, Destination: "/data"})
	}
	e.containers = append(e.containers, c)
	return c.ID
}

func (e *fakeEngine) container(name string) (fakeContainer, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c := e.byName(name); c != nil {
		return *c, true
	}
	return fakeContainer{}, false
}

// drop removes a container, as an administrator does.
func (e *fakeEngine) drop(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.containers = slices.DeleteFunc(e.containers, func(c *fakeContainer) bool { return c.Name == name })
}

// rename gives a container another name, as an administrator does.
func (e *fakeEngine) rename(name, to string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.byName(name).Name = to
}

// moment is what the engine knows at some time.
type moment struct {
	containers []fakeContainer
	volumes    map[string]bool
}

// now returns the moment that cutPower puts the engine back to.
func (e *fakeEngine) now() (m moment) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.containers {
		m.containers = append(m.containers, *c)
	}
	m.volumes = maps.Clone(e.volumes)
	return m
}

// cutPower puts the engine back to an earlier moment: an engine syncs little of what it writes. Nothing runs
// after a power cut.
func (e *fakeEngine) cutPower(m moment) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.containers, e.volumes = nil, maps.Clone(m.volumes)
	for _, c := range m.containers {
		c.Running = false
		e.containers = append(e.containers, &c)
	}
}

// prune removes all containers that do not run, as docker container prune does, with their volumes.
func (e *fakeEngine) prune() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.containers = slices.DeleteFunc(e.containers, func(c *fakeContainer) bool { return !c.Running })
	e.volumes = map[string]bool{}
	for _, c := range e.containers {
		e.volumes[c.volume] = true
	}
}

func (e *fakeEngine) names() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	names := []string{}
	for _, c := range e.containers {
		names = append(names, c.Name)
	}
	slices.Sort(names)
	return names
}

// wantNames fails the test unless these are all containers.
func (e *fakeEngine) wantNames(t testing.TB, want ...string) {
	t.Helper()
	if got := e.names(); !slices.Equal(got, want) {
		t.Errorf("there are the containers %q, want %q", got, want)
	}
}

// wantImages fails the test unless these are all images.
func (e *fakeEngine) wantImages(t testing.TB, want ...string) {
	t.Helper()
	if got := e.imageTags(); !slices.Equal(got, want) {
		t.Errorf("there are the images %q, want %q", got, want)
	}
}

// imageTags returns the tags of all images, sorted; for an image without one, its id.
func (e *fakeEngine) imageTags() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	tags := []string{}
	for _, img := range e.images {
		tags = append(tags, img.tags...)
		if len(img.tags) == 0 {
			tags = append(tags, img.id)
		}
	}
	slices.Sort(tags)
	return tags
}

var versionPrefix = regexp.MustCompile(`^/v1\.[0-9]+`)

func (e *fakeEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	speaks := e.dialect
	e.mu.Unlock()
	w.Header().Set("Api-Version", speaks.newest)
	if r.URL.Path == "/_ping" {
		return
	}
	path := r.URL.EscapedPath()
	version := versionPrefix.FindString(path)
	path = strings.TrimPrefix(path, version)
	switch asked := strings.TrimPrefix(version, "/v"); {
	case versions.LessThan(asked, speaks.oldest):
		reply(w, 400, fmt.Sprintf("client version %s is too old. Minimum supported API version is %s, "+
			"please upgrade your client to a newer version", asked, speaks.oldest))
		return
	case versions.GreaterThan(asked, speaks.newest):
		reply(w, 400, "client version "+asked+" is too new. Maximum supported API version is "+speaks.newest)
		return
	case path == "/version":
		parts := []map[string]string{}
		for _, name := range speaks.parts {
			parts = append(parts, map[string]string{"Name": name, "Version": "1"})
		}
		replyJSON(w, 200, map[string]any{"ApiVersion": speaks.newest, "MinAPIVersion": speaks.oldest,
			"Components": parts})
		return
	}
	if r.URL.Query().Get("fromSrc") == "" {
		// To its end, or net/http does not notice when the client leaves.
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
	}
	e.mu.Lock()
	call := r.Method + " " + path
	if r.URL.RawQuery != "" {
		call += "?" + r.URL.RawQuery
	}
	e.recorded = append(e.recorded, call)
	intercept := e.intercept
	end := path[strings.LastIndex(path, "/"):]
	e.answering[end]++
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.answering[end]--
	}()
	if intercept != nil && intercept(w, r) {
		return
	}
	e.answer(w, r, path)
}

// answer dispatches by hand: a ServeMux would redirect odd paths, and tests must see them.
func (e *fakeEngine) answer(w http.ResponseWriter, r *http.Request, path string) {
	switch r.Method + " " + path {
	case "GET /containers/json":
		e.list(w, r)
		return
	case "POST /containers/create":
		e.create(w, r)
		return
	case "GET /images/json":
		e.listImages(w, r)
		return
	case "GET /info":
		info := system.Info{DockerRootDir: e.dataRoot, ServerVersion: "1", Architecture: "x86_64", NCPU: 8,
			MemTotal: 33645404160}
		if e.dialect.containerd {
			info.DriverStatus = [][2]string{{"driver-type", "io.containerd.snapshotter.v1"}}
		}
		replyJSON(w, 200, info)
		return
	case "POST /images/create":
		if r.URL.Query().Has("fromSrc") {
			e.importImage(w, r)
		} else {
			e.pull(w, r)
		}
		return
	}
	kind, ref, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	action := ""
	// Names of images have slashes.
	if cut := strings.LastIndex(ref, "/"); cut >= 0 && r.Method != http.MethodDelete {
		ref, action = ref[:cut], ref[cut:]
	}
	switch r.Method + " " + kind + action {
	case "GET containers/stats":
		e.stats(w, r, ref)
	case "GET containers/logs":
		e.logs(w, r, ref)
	case "POST containers/attach":
		e.attach(w, r, ref)
	case "GET containers/json", "POST containers/start", "POST containers/stop", "POST containers/kill",
		"POST containers/rename", "POST containers/resize", "DELETE containers":
		e.onContainer(w, r, ref, action)
	case "GET images/json", "POST images/tag", "DELETE images":
		e.onImage(w, r, ref, action)
	default:
		e.t.Errorf("the engine was asked %s %s", r.Method, path)
		reply(w, 404, "page not found")
	}
}

func reply(w http.ResponseWriter, status int, message string) {
	replyJSON(w, status, map[string]string{"message": message})
}

func replyJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

// replyShuffled answers with the keys of each object in any order, as an engine may.
func replyShuffled(w http.ResponseWriter, v any) {
	text, _ := json.Marshal(v)
	w.Header().Set("Content-Type", "application/json")
	w.Write(append(shuffled(text), '\n'))
}

func shuffled(text json.RawMessage) json.RawMessage {
	var members map[string]json.RawMessage
	if json.Unmarshal(text, &members) != nil || members == nil {
		return text
	}
	var parts []string
	for key, value := range members { // in another order each time
		quoted, _ := json.Marshal(key)
		parts = append(parts, string(quoted)+":"+string(shuffled(value)))
	}
	return json.RawMessage("{" + strings.Join(parts, ",") + "}")
}

func (e *fakeEngine) byName(name string) *fakeContainer {
	for _, c := range e.containers {
		if c.Name == name {
			return c
		}
	}
	return nil
}

// find resolves a full id, then a name, then a prefix of ids, and answers if it cannot.
func (e *fakeEngine) find(w http.ResponseWriter, ref string) *fakeContainer {
	var byPrefix []*fakeContainer
	for _, c := range e.containers {
		if c.ID == ref {
			return c
		}
		if strings.HasPrefix(c.ID, ref) {
			byPrefix = append(byPrefix, c)
		}
	}
	if c := e.byName(ref); c != nil {
		return c
	}
	if len(byPrefix) == 1 {
		return byPrefix[0]
	}
	if len(byPrefix) > 1 {
		reply(w, 500, "Multiple IDs found with provided prefix: "+ref)
	} else {
		reply(w, 404, "No such container: "+ref)
	}
	return nil
}

func (e *fakeEngine) list(w http.ResponseWriter, r *http.Request) {
	var filter struct{ Label, Name map[string]bool }
	if text := r.URL.Query().Get("filters"); text != "" {
		if err := json.Unmarshal([]byte(text), &filter); err != nil {
			e.t.Errorf("the engine was asked for filters %s: %v", text, err)
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	type listed struct {
		container.Summary
		ImageManifestDescriptor any `json:",omitempty"`
	}
	found := []listed{}
	for _, c := range e.containers {
		matches := c.Running || r.URL.Query().Get("all") == "1"
		for label := range filter.Label {
			key, value, withValue := strings.Cut(label, "=")
			got, ok := c.Labels[key]
			matches = matches && ok && (got == value || !withValue)
		}
		for name := range filter.Name { // the engine takes it for a regular expression
			matches = matches && regexp.MustCompile(name).MatchString("/"+c.Name)
		}
		if matches {
			entry := listed{Summary: container.Summary{ID: c.ID, Names: []string{"/" + c.Name}, Image: c.Config.Image,
				ImageID: c.imageID, Labels: c.Labels, State: c.state(), Mounts: c.mounts}}
			if e.dialect.containerd {
				entry.ImageManifestDescriptor = map[string]any{"digest": c.imageID, "size": 405,
					"mediaType": "application/vnd.oci.image.manifest.v1+json"}
			}
			found = append(found, entry)
		}
	}
	slices.Reverse(found) // newest first
	replyJSON(w, 200, found)
}

func (c *fakeContainer) state() container.ContainerState {
	switch {
	case c.Running:
		return container.StateRunning
	case c.started:
		return container.StateExited
	}
	return container.StateCreated
}

var fakeName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// nameRefusal returns the engine's answer to a container's new name, or 0.
func (e *fakeEngine) nameRefusal(name string) (status int, message string) {
	if !fakeName.MatchString(name) {
		return 400, fmt.Sprintf("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", name)
	}
	if other := e.byName(name); other != nil {
		return 409, fmt.Sprintf(`Conflict. The container name "/%s" is already in use by container "%s". `+
			`You have to remove (or rename) that container to be able to reuse that name.`, name, other.ID)
	}
	return 0, ""
}

func (e *fakeEngine) create(w http.ResponseWriter, r *http.Request) {
	var body container.CreateRequest
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil || body.Config == nil || body.HostConfig == nil {
		e.t.Errorf("the engine was sent a container that it cannot read: %v", err)
		reply(w, 400, "invalid JSON")
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	name := r.URL.Query().Get("name")
	img := e.findImage(body.Image)
	switch status, message := e.nameRefusal(name); {
	case img == nil:
		reply(w, 404, "No such image: "+tagged(body.Image))
		return
	case len(img.cmd) == 0 && len(body.Cmd) == 0:
		reply(w, 400, e.dialect.noCommand)
		return
	case status != 0:
		reply(w, status, message)
		return
	}
	for _, m := range body.HostConfig.Mounts {
		if _, err := os.Stat(m.Source); err != nil {
			reply(w, 400, `invalid mount config for type "bind": bind source path does not exist: `+m.Source)
			return
		}
	}
	c := &fakeContainer{ID: randomHex(), Name: name, Labels: body.Labels, Config: *body.Config,
		HostConfig: *body.HostConfig, imageID: img.id}
	c.volume = c.ID
	for _, other := range body.HostConfig.VolumesFrom {
		from := e.find(w, other)
		if from == nil {
			return
		}
		c.volume = from.volume
	}
	e.volumes[c.volume] = true
	for _, m := range body.HostConfig.Mounts {
		c.mounts = append(c.mounts, container.MountPoint{Type: m.Type, Source: m.Source, Destination: m.Target})
	}
	e.containers = append(e.containers, c)
	replyJSON(w, 201, container.CreateResponse{ID: c.ID, Warnings: []string{}})
}

func (e *fakeEngine) onContainer(w http.ResponseWriter, r *http.Request, ref, action string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.find(w, ref)
	if c == nil {
		return
	}
	status := http.StatusNoContent
	defer e.change()
	switch action {
	case "/json":
		replyShuffled(w, container.InspectResponse{
			ContainerJSONBase: &container.ContainerJSONBase{ID: c.ID, Name: "/" + c.Name, Image: c.imageID,
				HostConfig: &c.HostConfig,
				State: &container.State{Status: c.state(), Running: c.Running,
					StartedAt: cmp.Or(c.startedAt, zeroTime)}},
			Config: &c.Config,
			Mounts: c.mounts,
		})
		return
	case "/start":
		if c.Running {
			status = http.StatusNotModified
		} else if end, taken := e.portTaken(c); taken {
			reply(w, 500, fmt.Sprintf(e.dialect.portTaken, c.Name, randomHex(), end))
			return
		} else {
			c.startedAt = time.Now().UTC().Format(time.RFC3339Nano)
		}
		c.Running, c.started = true, true
	case "/stop":
		if !c.Running {
			status = http.StatusNotModified
		}
		c.Running = false
	case "/kill":
		if !c.Running {
			reply(w, 409, fmt.Sprintf("Cannot kill container: %s: "+e.dialect.notRunning, ref, c.ID))
			return
		}
		c.Running = false
	case "/rename":
		if status, message := e.nameRefusal(r.URL.Query().Get("name")); status != 0 {
			reply(w, status, "Error when allocating new name: "+message)
			return
		}
		c.Name = r.URL.Query().Get("name")
	case "/resize":
		if !c.Running {
			reply(w, 409, fmt.Sprintf(e.dialect.notRunning, c.ID))
			return
		}
		c.tty = r.URL.Query().Get("h") + "x" + r.URL.Query().Get("w")
		status = http.StatusOK
	default:
		if c.Running && r.URL.Query().Get("force") != "1" {
			reply(w, 409, fmt.Sprintf(e.dialect.isRunning, ref))
			return
		}
		e.containers = slices.DeleteFunc(e.containers, func(other *fakeContainer) bool { return other == c })
		uses := func(other *fakeContainer) bool { return other.volume == c.volume }
		if r.URL.Query().Get("v") == "1" && !slices.ContainsFunc(e.containers, uses) {
			delete(e.volumes, c.volume)
		}
	}
	w.WriteHeader(status)
}

// portTaken returns the first end on the host of a container's ports that is not free.
func (e *fakeEngine) portTaken(c *fakeContainer) (end string, taken bool) {
	ends := func(c *fakeContainer) (all []string) {
		for _, bindings := range c.HostConfig.PortBindings {
			for _, binding := range bindings {
				all = append(all, net.JoinHostPort(cmp.Or(binding.HostIP, "0.0.0.0"), binding.HostPort))
			}
		}
		return all
	}
	used := map[string]bool{}
	for _, other := range e.containers {
		for _, end := range ends(other) {
			used[end] = used[end] || other.Running
		}
	}
	for _, end := range ends(c) {
		if _, port, _ := net.SplitHostPort(end); port != "0" && (used[end] || port == e.taken) {
			return end, true
		}
	}
	return "", false
}

const zeroTime = "0001-01-01T00:00:00Z"

// stats sends one complete frame, or many of which the first has no earlier sample. Of
// a container that does not run it sends frames without a time, and does not end.
func (e *fakeEngine) stats(w http.ResponseWriter, r *http.Request, ref string) {
	e.mu.Lock()
	c := e.find(w, ref)
	e.mu.Unlock()
	if c == nil {
		return
	}
	preread := zeroTime
	if r.URL.Query().Get("stream") != "1" {
		preread = time.Now().Add(-time.Second).UTC().Format(time.RFC3339Nano)
	}
	for every := time.NewTicker(3 * time.Millisecond); ; {
		e.mu.Lock()
		read := time.Now().UTC().Format(time.RFC3339Nano)
		if !c.Running {
			read, preread = zeroTime, zeroTime
		}
		e.frames++
		frame := fmt.Sprintf(`{"read":%q,"preread":%q,"pids_stats":{"current":%d},"name":%q,"id":%q}`+"\n",
			read, preread, e.frames, "/"+c.Name, c.ID)
		gone := !slices.Contains(e.containers, c)
		e.mu.Unlock()
		if _, err := io.WriteString(w, frame); err != nil || gone || r.URL.Query().Get("stream") != "1" {
			return
		}
		w.(http.Flusher).Flush()
		preread = read
		select {
		case <-every.C:
		case <-r.Context().Done():
			return
		}
	}
}

// inRun reports whether a container is in the run that began at startedAt. The caller
// holds the mutex.
func (e *fakeEngine) inRun(c *fakeContainer, startedAt string) bool {
	return !e.closed && c.Running && c.startedAt == startedAt && slices.Contains(e.containers, c)
}

// print has a service print a text in one go.
func (e *fakeEngine) print(name string, stream stdcopy.StdType, text string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.byName(name)
	c.output = append(c.output, fakeOutput{stream, text})
	e.change()
}

// logs sends what a container has printed, in frames unless it has a tty, and with
// follow what it prints until it ends.
func (e *fakeEngine) logs(w http.ResponseWriter, r *http.Request, ref string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.find(w, ref)
	if c == nil {
		return
	}
	query := r.URL.Query()
	if query.Get("stdout") != "1" && query.Get("stderr") != "1" {
		reply(w, 400, e.dialect.noStream)
		return
	}
	w.WriteHeader(200)
	w.(http.Flusher).Flush()
	wanted := map[stdcopy.StdType]bool{stdcopy.Stdout: query.Get("stdout") == "1",
		stdcopy.Stderr: query.Get("stderr") == "1"}
	startedAt, sent := c.startedAt, 0
	for {
		output, changed, ended := c.output[sent:], e.changed, query.Get("follow") != "1" || !e.inRun(c, startedAt)
		sent += len(output)
		e.mu.Unlock()
		for _, printed := range output {
			to := io.Writer(w)
			if !c.Config.Tty {
				to = stdcopy.NewStdWriter(w, printed.stream)
			}
			if wanted[printed.stream] {
				io.WriteString(to, printed.text)
			}
		}
		w.(http.Flusher).Flush()
		if !ended {
			select {
			case <-changed:
			case <-r.Context().Done():
				ended = true
			}
		}
		e.mu.Lock()
		if ended {
			return
		}
	}
}

// setDeaf has a service read its stdin no more, or again.
func (e *fakeEngine) setDeaf(name string, deaf bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.byName(name).deaf = deaf
	e.change()
}

// input returns what a service has read.
func (e *fakeEngine) input(name string) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var text strings.Builder
	if c := e.byName(name); c != nil {
		for _, in := range c.stdin {
			text.WriteString(in.text)
		}
	}
	return text.String()
}

// wantAttached waits until a call has been attached to a service's run. Until then it could be to the next
// run.
func (e *fakeEngine) wantAttached(t testing.TB) {
	t.Helper()
	waitFor(t, "an attach", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.attaches > 0
	})
}

// takeInput returns what a service has read, and forgets it.
func (e *fakeEngine) takeInput(name string) string {
	text := e.input(name)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.byName(name).stdin = nil
	return text
}

// attach passes a connection's bytes on to a container's stdin, in small pieces between
// those of other connections, until their end or that of the container's run.
func (e *fakeEngine) attach(w http.ResponseWriter, r *http.Request, ref string) {
	query := r.URL.Query()
	if query.Get("stream") != "1" || query.Get("stdin") != "1" || query.Has("stdout") || query.Has("stderr") ||
		query.Has("logs") ||
		r.Header.Get("Connection") != "Upgrade" || r.Header.Get("Upgrade") != "tcp" {
		e.t.Errorf("the engine was asked to attach with %v, %v", query, r.Header)
	}
	e.mu.Lock()
	c := e.find(w, ref)
	e.mu.Unlock()
	if c == nil {
		return
	}
	conn, buffered, err := w.(http.Hijacker).Hijack()
	if err != nil {
		e.t.Error(err)
		return
	}
	defer conn.Close()
	io.WriteString(conn, "HTTP/1.1 101 UPGRADED\r\n"+
		"Content-Type: application/vnd.docker.raw-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
	e.mu.Lock()
	defer e.mu.Unlock()
	e.attaches++
	number, startedAt, over := e.attaches, c.startedAt, make(chan struct{})
	defer close(over)
	go func() { // ends with the run or the connection
		e.mu.Lock()
		defer e.mu.Unlock()
		for e.inRun(c, startedAt) {
			changed := e.changed
			e.mu.Unlock()
			select {
			case <-changed:
			case <-over:
			}
			e.mu.Lock()
			select {
			case <-over:
				return
			default:
			}
		}
		conn.Close()
	}()
	escape := escapeKeys{keys: parseKeys(query.Get("detachKeys"))}
	piece := make([]byte, 1000)
	for {
		e.mu.Unlock()
		n, err := buffered.Read(piece)
		text, detached := piece[:n], false
		if c.Config.Tty {
			text, detached = escape.pass(text)
		}
		e.mu.Lock()
		for c.deaf && e.inRun(c, startedAt) {
			changed := e.changed
			e.mu.Unlock()
			<-changed
			e.mu.Lock()
		}
		if !e.inRun(c, startedAt) {
			return
		}
		if len(text) > 0 {
			c.stdin = append(c.stdin, fakeInput{number, string(text)})
			e.change()
		}
		if err != nil || detached {
			return
		}
	}
}

// escapeKeys looks for the keys that detach, as github.com/moby/term does: it keeps back
// what may be the beginning of them, and does not give it out at the end.
type escapeKeys struct {
	keys []byte
	seen int
}

// parseKeys reads the names of the keys, or takes the engine's default.
func parseKeys(names string) (keys []byte) {
	if names == "" {
		return []byte{'p' - 'a' + 1, 'q' - 'a' + 1}
	}
	for name := range strings.SplitSeq(names, ",") {
		if letter, ok := strings.CutPrefix(name, "ctrl-"); ok {
			keys = append(keys, letter[0]-'a'+1)
		} else {
			keys = append(keys, name...)
		}
	}
	return keys
}

func (k *escapeKeys) pass(text []byte) (passed []byte, detached bool) {
	for _, b := range text {
		if b == k.keys[k.seen] {
			if k.seen++; k.seen == len(k.keys) {
				return passed, true
			}
			continue
		}
		passed = append(append(passed, k.keys[:k.seen]...), b)
		k.seen = 0
	}
	return passed, false
}

// tagged completes an image's name as the engine does.
func tagged(name string) string {
	name = strings.TrimPrefix(name, "docker.io/")
	name = strings.TrimPrefix(name, "library/")
	if !strings.Contains(name[strings.LastIndex(name, "/")+1:], ":") {
		name += ":latest"
	}
	return name
}

func (e *fakeEngine) findImage(name string) *fakeImage {
	for _, img := range e.images {
		if name != "" && (img.id == name || slices.Contains(img.tags, tagged(name))) {
			return img
		}
	}
	return nil
}

func (e *fakeEngine) newImage(name string, cmd []string) *fakeImage {
	img := &fakeImage{id: "sha256:" + randomHex(), cmd: cmd}
	if name != "" {
		img.tags = []string{tagged(name)}
	}
	e.images = append(e.images, img)
	return img
}

// importImage makes an image without a command of any body that is complete, unless it has a link to nothing.
func (e *fakeEngine) importImage(w http.ResponseWriter, r *http.Request) {
	upload, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	name := strings.TrimSuffix(r.URL.Query().Get("repo")+":"+r.URL.Query().Get("tag"), ":")
	names := map[string]bool{}
	for archive := tar.NewReader(bytes.NewReader(upload)); ; {
		header, err := archive.Next()
		if err != nil { // the end, or what the engine takes for it
			replyJSON(w, 200, map[string]string{"status": e.newImage(name, nil).id})
			return
		}
		if header.Typeflag == tar.TypeLink && !names[header.Linkname] {
			reply(w, 500, fmt.Sprintf(e.dialect.cannotUnpack, name, header.Linkname, header.Name))
			if e.dialect.containerd { // which has stored it before
				e.newImage(name, nil)
			}
			return
		}
		names[header.Name] = true
	}
}

// listImages answers with the images of one repository.
func (e *fakeEngine) listImages(w http.ResponseWriter, r *http.Request) {
	var filter struct{ Reference map[string]bool }
	if err := json.Unmarshal([]byte(r.URL.Query().Get("filters")), &filter); err != nil ||
		len(filter.Reference) != 1 {
		e.t.Errorf("the engine was asked for images with %s: %v", r.URL.RawQuery, err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	found := []image.Summary{}
	for _, img := range e.images {
		inRepository := func(tag string) bool { return filter.Reference[tag[:strings.LastIndex(tag, ":")]] }
		if slices.ContainsFunc(img.tags, inRepository) {
			found = append(found, image.Summary{ID: img.id, RepoTags: img.tags})
		}
	}
	replyJSON(w, 200, found)
}

func (e *fakeEngine) pull(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Query().Get("fromImage")
	if tag := r.URL.Query().Get("tag"); tag != "" {
		name += ":" + tag
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	whole, known := e.remote[tagged(name)]
	if !known {
		reply(w, 404, fmt.Sprintf(e.dialect.noSuchRemote, name))
		return
	}
	replyJSON(w, 200, map[string]string{"status": "Pulling from " + name})
	if !whole {
		json.NewEncoder(w).Encode(map[string]any{"error": e.dialect.noSuchLayer,
			"errorDetail": map[string]string{"message": e.dialect.noSuchLayer}})
		return
	}
	e.newImage(name, []string{"/run"})
	json.NewEncoder(w).Encode(map[string]string{"status": "Status: Downloaded newer image for " + name})
}

// imageReference is the engine's grammar of images' names, and of ids.
var imageReference = regexp.MustCompile(`^([A-Za-z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*` +
	`(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$`)

func (e *fakeEngine) onImage(w http.ResponseWriter, r *http.Request, name, action string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !imageReference.MatchString(name) {
		reply(w, 400, "no such image: "+name+": invalid reference format")
		return
	}
	img := e.findImage(name)
	if img == nil {
		reply(w, 404, "No such image: "+name)
		return
	}
	switch {
	case r.Method == http.MethodDelete:
		img.tags = slices.DeleteFunc(img.tags, func(tag string) bool {
			return tag == tagged(name) || name == img.id
		})
		if len(img.tags) == 0 {
			e.images = slices.DeleteFunc(e.images, func(other *fakeImage) bool { return other == img })
		}
		replyJSON(w, 200, []map[string]string{{"Deleted": img.id}})
	case action == "/tag":
		img.tags = append(img.tags, tagged(r.URL.Query().Get("repo")+":"+r.URL.Query().Get("tag")))
		w.WriteHeader(http.StatusCreated)
	default:
		replyJSON(w, 200, map[string]any{"Id": img.id, "RepoTags": img.tags,
			"Config": map[string]any{"Cmd": img.cmd, "User": img.user}})
	}
}

func randomHex() string {
	b := make([]byte, 32)
	rand.Read(b)
	return hex.EncodeToString(b)
}
