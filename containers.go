package main

import (
	"cmp"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
)

const (
	// candidatePrefix and a service's id are the name of a container that may become the service's. No id
	// has a dot, so the names of services and candidates never collide.
	candidatePrefix = "duxcore.candidate."

	labelService  = "duxcore.service"  // the service's id
	labelBinds    = "duxcore.binds"    // the path of its daemon's bind root
	labelRevision = "duxcore.revision" // the revision of the record that the container was made from
)

// containers finds the engine's containers that are this daemon's. It changes nothing.
type containers struct {
	engine  *engine
	binds   *bindRoot
	locks   *keyedMutex   // by service id; see services
	timeout time.Duration // of a read
}

// serviceOf returns the service that a container belongs to, if it is this daemon's: it has the labels of the
// service and of the bind root, and it mounts the service's directory. The labels alone prove nothing, since
// an image that docker commit made from a service has them too. Everything below relies on this function.
func (c *containers) serviceOf(labels map[string]string, mounts []container.MountPoint) (string, bool) {
	id := labels[labelService]
	if !serviceID.MatchString(id) || labels[labelBinds] != c.binds.path {
		return "", false
	}
	dir := filepath.Join(c.binds.path, id)
	return id, slices.ContainsFunc(mounts, func(m container.MountPoint) bool { return m.Source == dir })
}

// listEntry is a container in the engine's list.
type listEntry struct {
	ID     string
	Names  []string // each with a slash
	Labels map[string]string
	State  container.ContainerState
	Mounts []container.MountPoint
	raw    json.RawMessage // the whole entry
}

// hasRevision reports whether the container exists and was made from this revision of the record.
func (e *listEntry) hasRevision(revision string) bool {
	return e != nil && e.Labels[labelRevision] == revision
}

// serviceContainers are the containers of one service. A container that does not exist is nil.
type serviceContainers struct {
	current   *listEntry // named as the service
	candidate *listEntry
	renamed   []*listEntry // by an administrator; they may be using the directory
}

// errRenamed returns an error if the service has a renamed container.
func (s serviceContainers) errRenamed(id string) error {
	if len(s.renamed) == 0 {
		return nil
	}
	name := strings.Join(s.renamed[0].Names, " ")
	return newAPIError(kindRenamedByHand, "service %q has a container that was given another name: %q", id, name)
}

// ofService returns the containers of one service.
func (c *containers) ofService(ctx context.Context, id string) (serviceContainers, error) {
	all, err := c.grouped(ctx, labelService+"="+id)
	return all[id], err
}

// all returns the containers of all services, by id.
func (c *containers) all(ctx context.Context) (map[string]serviceContainers, error) {
	return c.grouped(ctx, labelBinds+"="+c.binds.path)
}

// grouped returns this daemon's containers that have a label, by service. During a rename the engine lists a
// candidate under both names: it counts as the service's container.
func (c *containers) grouped(ctx context.Context, label string) (map[string]serviceContainers, error) {
	list, err := c.list(ctx, filters.Arg("label", label))
	if err != nil {
		return nil, err
	}
	all := map[string]serviceContainers{}
	for _, entry := range list {
		id, ours := c.serviceOf(entry.Labels, entry.Mounts)
		if !ours {
			continue
		}
		group := all[id]
		switch {
		case slices.Contains(entry.Names, "/"+id):
			group.current = entry
		case slices.Contains(entry.Names, "/"+candidatePrefix+id):
			group.candidate = entry
		default:
			group.renamed = append(group.renamed, entry)
		}
		all[id] = group
	}
	return all, nil
}

// nameTaken reports whether any container, ours or not, has a service's name. It uses the list because the
// engine also takes a name for a prefix of an id: inspecting it fails if several ids have that prefix.
func (c *containers) nameTaken(ctx context.Context, id string) (bool, error) {
	list, err := c.list(ctx, filters.Arg("name", "^/"+id+"$"))
	return slices.ContainsFunc(list, func(e *listEntry) bool { return slices.Contains(e.Names, "/"+id) }), err
}

// isMissing reports whether the engine says that it has no container of a service's name. An engine that has
// just started may not list every container that it has.
func (c *containers) isMissing(ctx context.Context, id string) bool {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	found, err := c.engine.api().ContainerInspect(ctx, id)
	return errdefs.IsNotFound(err) || err == nil && found.Name != "/"+id // a prefix of another one's id
}

// list returns the engine's containers that match a filter, running or not.
func (c *containers) list(ctx context.Context, filter filters.KeyValuePair) (list []*listEntry, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	filterJSON, err := filters.ToJSON(filters.NewArgs(filter))
	if err != nil {
		return nil, err
	}
	query := url.Values{"all": {"1"}, "filters": {filterJSON}}
	text, err := c.get(ctx, url.URL{Path: c.engine.versioned("/containers/json"), RawQuery: query.Encode()})
	if err != nil {
		return nil, err
	}
	var raw []json.RawMessage
	if err := json.Unmarshal(text, &raw); err != nil || raw == nil {
		return nil, cmp.Or(err, errUnreadable)
	}
	for _, entry := range raw {
		e := &listEntry{raw: entry}
		if err := json.Unmarshal(entry, e); err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	return list, nil
}

// get returns the body of a GET request to the engine. The list and the inspections of containers, which a
// core polls every second, do not use the SDK, because it decodes them in full and drops the fields that it
// does not know. With the SDK, an inspection takes 1.16 times as long, and 16 clients get 0.80 of the
// throughput (measured in turns, with engine 20.10).
func (c *containers) get(ctx context.Context, call url.URL) ([]byte, error) {
	resp, err := c.engine.send(ctx, http.MethodGet, call, http.Header{}, http.StatusOK)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(resp.Body)
}

// containerInfo is a service's container: the fields that the daemon needs, and the engine's whole answer.
type containerInfo struct {
	ID    string
	Name  string // with a slash
	State struct {
		Running   bool
		StartedAt string
	}
	Config struct {
		Labels    map[string]string
		OpenStdin bool
		Tty       bool
	}
	Mounts []container.MountPoint
	raw    []byte
}

// lookup returns the container of a service. It takes the lock only if the engine does not give it that
// container, so that a read or a kill never waits for a stop. Later calls use the full container id that it
// returns.
func (c *containers) lookup(ctx context.Context, id string) (containerInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout) // the routes of streams have no limit
	defer cancel()
	exists, err := c.binds.exists(id)
	if err != nil {
		return containerInfo{}, err
	}
	if !exists {
		return containerInfo{}, noSuchService(id)
	}
	found, err := c.inspect(ctx, id, id)
	if err == nil || ctx.Err() != nil {
		return found, err
	}
	// No container of ours has the name; or the engine cannot tell, because the name is a prefix of several ids;
	// or the engine fails, and then the list fails too.
	return c.lookupLocked(ctx, id)
}

// lookupLocked is lookup under the service's lock, which a start that is replacing the container holds.
func (c *containers) lookupLocked(ctx context.Context, id string) (containerInfo, error) {
	unlock, err := c.locks.lock(ctx, id)
	if err != nil {
		return containerInfo{}, err
	}
	defer unlock()
	found, err := c.ofService(ctx, id)
	if err != nil {
		return containerInfo{}, err
	}
	if err := found.errRenamed(id); err != nil {
		return containerInfo{}, err
	}
	if found.current != nil {
		return c.inspect(ctx, id, found.current.ID)
	}
	exists, err := c.binds.exists(id)
	if err != nil {
		return containerInfo{}, err
	}
	if !exists {
		return containerInfo{}, noSuchService(id)
	}
	return containerInfo{}, newAPIError(kindUnavailable,
		"the container of service %q is missing; it will be made again", id)
}

// inspect inspects a container by its name or full id. It returns a 404 unless that is the service's
// container. The engine also accepts prefixes of ids, so the name must be exact.
func (c *containers) inspect(ctx context.Context, id, nameOrID string) (containerInfo, error) {
	text, err := c.get(ctx, url.URL{Path: c.engine.versioned("/containers/" + nameOrID + "/json")})
	if err != nil {
		return containerInfo{}, err
	}
	found := containerInfo{raw: text}
	if err := json.Unmarshal(text, &found); err != nil {
		return containerInfo{}, err
	}
	if found.ID == "" {
		return containerInfo{}, errUnreadable
	}
	service, ours := c.serviceOf(found.Config.Labels, found.Mounts)
	if !ours || service != id || found.Name != "/"+id {
		return containerInfo{}, noSuchService(id)
	}
	return found, nil
}

// keyedMutex is one mutex per key, such as a service's id. Waiters get it in the order in which they came,
// because the runtime queues the senders on a channel in that order. Keys never wait for each other.
type keyedMutex struct {
	mu    sync.Mutex // guards slots; never held while a caller waits
	slots map[string]*slot
}

// slot is the mutex of one key. It exists while a caller holds it or waits for it.
type slot struct {
	held  chan struct{} // of capacity 1: the sender of the value in it holds the mutex
	users int           // the holder and the waiters
}

func newKeyedMutex() *keyedMutex { return &keyedMutex{slots: map[string]*slot{}} }

// lock waits for a key's mutex. If ctx is done first, the waiter leaves the queue and gets errBusy.
func (k *keyedMutex) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	s := k.slots[key]
	if s == nil {
		s = &slot{held: make(chan struct{}, 1)}
		k.slots[key] = s
	}
	s.users++
	k.mu.Unlock()
	select {
	case s.held <- struct{}{}:
		return func() { <-s.held; k.leave(key, s) }, nil
	case <-ctx.Done():
		k.leave(key, s)
		return nil, errBusy
	}
}

// leave removes one user of a slot, and with the last user the slot.
func (k *keyedMutex) leave(key string, s *slot) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.users--; s.users == 0 {
		delete(k.slots, key)
	}
}
