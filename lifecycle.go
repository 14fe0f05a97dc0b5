package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
)

// The names of containers are the journal of what is under way. An entry is written
// before what it stands for is begun, and removed after that is done, so that settle
// can finish or undo it from the names alone.
const (
	roleCurrent = ""     // <id>: the service
	roleNew     = "new"  // a create that has not committed: it and its directory are worthless
	roleNext    = "next" // the service with its new environment, waiting for the next start
	rolePrev    = "prev" // an earlier next, until its successor exists
	roleGone    = "gone" // a delete that has committed: all that belongs to it has to go

	labelService = "duxcore.service" // the service's id
	labelBinds   = "duxcore.binds"   // the daemon's bind root: whose service it is
	labelParams  = "duxcore.params"  // the service's serviceParams, as JSON
)

// undoTime is for undoing a create that failed, whatever became of its request.
const undoTime = 2 * time.Minute

// journal holds one service's containers by role. A role that is not there has an empty ID.
type journal map[string]container.Summary

func containerName(role, id string) string {
	if role == roleCurrent {
		return id
	}
	return "duxcore." + role + "." + id
}

// create makes a service, or undoes all of it. Until it commits it is given up when
// ctx ends; calls that change the engine's state are not, because the engine may
// carry them out nevertheless, and later.
func (s *server) create(ctx context.Context, p serviceParams, registryAuth string) error {
	unlock, err := s.locks.lock(ctx, p.ID)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := s.settle(ctx, p.ID); err != nil {
		return err
	}
	// Known early, before a download. It is the renaming at the end that decides.
	if c, err := s.engine.api().ContainerInspect(ctx, p.ID); err == nil && c.Name == "/"+p.ID {
		return failure(http.StatusConflict, "there is a container %q already", p.ID)
	}
	if err := s.ensureImage(ctx, p.Image, registryAuth); err != nil {
		return err
	}
	if err := s.binds.makeEmpty(p.ID, p.owner()); err != nil {
		return err
	}
	if err := s.createContents(ctx, p); err != nil {
		undo, cancel := context.WithTimeout(s.life, undoTime)
		defer cancel()
		if _, err := s.settle(undo, p.ID); err != nil {
			s.log.Warn("a failed create is still to be undone", "id", p.ID, "err", err)
		}
		return err
	}
	return nil
}

// createContents is the part of create that the journal covers.
func (s *server) createContents(ctx context.Context, p serviceParams) error {
	change, cancel := context.WithTimeout(s.life, s.createTimeout)
	defer cancel()
	config, host := s.containerSpec(p)
	created, err := s.engine.api().ContainerCreate(change, config, host, nil, nil, containerName(roleNew, p.ID))
	if err != nil {
		return fmt.Errorf("cannot create the container: %w", err)
	}
	if p.BindContents != "" {
		limits := unpackLimits{bytes: s.maxBindBytes, entries: s.maxBindFiles}
		if err := s.binds.fill(p.ID, p.owner(), func(dir *os.Root) error {
			return s.fetch.unpack(ctx, p.BindContents, dir, limits, p.owner())
		}); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.engine.api().ContainerRename(change, created.ID, p.ID); err != nil {
		return fmt.Errorf("cannot name the container: %w", err)
	}
	return nil
}

// setEnv replaces the service's variables, from the next start on. The container that
// waits for it is made from the service's own params, never from what inspect shows:
// that has the engine's defaults and choices in it. It shares the current one's
// anonymous volumes, which stay anonymous, so that they go with the last container.
func (s *server) setEnv(ctx context.Context, id string, env []string) error {
	unlock, found, err := s.begin(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	current := found[roleCurrent]
	var p serviceParams
	if err := json.Unmarshal([]byte(current.Labels[labelParams]), &p); err != nil {
		return fmt.Errorf("cannot read the label %s of service %q: %w", labelParams, id, err)
	}
	p.Env = env
	config, host := s.containerSpec(p)
	config.Image = current.ImageID // the name may mean another image by now
	host.VolumesFrom = []string{current.ID}

	if earlier := found[roleNext]; earlier.ID != "" {
		if err := s.engine.api().ContainerRename(ctx, earlier.ID, containerName(rolePrev, id)); err != nil {
			return err
		}
	}
	_, err = s.engine.api().ContainerCreate(ctx, config, host, nil, nil, containerName(roleNext, id))
	if err != nil {
		err = fmt.Errorf("cannot create the container with the new environment: %w", err)
	}
	// Settling removes the earlier one, or gives it its name back.
	if _, settleErr := s.settle(ctx, id); err == nil {
		return settleErr
	}
	return err
}

// control starts, stops or restarts a service. What holds already is no error.
func (s *server) control(ctx context.Context, id, op string) error {
	unlock, found, err := s.begin(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	current := found[roleCurrent]
	if op == "start" && current.State == container.StateRunning {
		return nil
	}
	if op != "start" {
		seconds := int(s.stopTimeout / time.Second) // the container's own may be an earlier daemon's
		if err := s.engine.api().ContainerStop(ctx, current.ID, container.StopOptions{Timeout: &seconds}); err != nil {
			return fmt.Errorf("cannot stop the service: %w", err)
		}
	}
	if op == "stop" {
		return nil
	}
	return s.startSettled(ctx, id, found)
}

// kill takes no lock: it must not wait behind the stop that it is there to cut short.
func (s *server) kill(ctx context.Context, id string) error {
	current, _, err := s.lookup(ctx, id)
	if err != nil || !current.State.Running {
		return err
	}
	return s.killContainer(ctx, current.ID)
}

// remove deletes a service with all that belongs to it, or the one of container and
// bind directory that is left.
func (s *server) remove(ctx context.Context, id string) error {
	unlock, err := s.locks.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	hasDir := s.binds.has(id) // settling removes an empty one without a container
	found, err := s.settle(ctx, id)
	if err != nil {
		return err
	}
	if current := found[roleCurrent]; current.ID != "" {
		if err := s.engine.api().ContainerRename(ctx, current.ID, containerName(roleGone, id)); err != nil {
			return err
		}
		_, err := s.settle(ctx, id)
		return err
	}
	if !hasDir {
		return noSuchService(id)
	}
	return s.binds.remove(ctx, id)
}

// begin opens an operation that changes a service: under its lock, and settled. It
// returns the containers that the service has, the current one always among them.
func (s *server) begin(ctx context.Context, id string) (unlock func(), found journal, err error) {
	unlock, err = s.locks.lock(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	found, err = s.settle(ctx, id)
	if err == nil && found[roleCurrent].ID == "" {
		err = noSuchService(id)
	}
	if err != nil {
		unlock()
		return nil, nil, err
	}
	return unlock, found, nil
}

// startSettled starts the current container, which does not run, or puts the next one
// in its place and starts that.
func (s *server) startSettled(ctx context.Context, id string, found journal) error {
	start := found[roleCurrent].ID
	if next := found[roleNext].ID; next != "" {
		if err := s.removeContainer(ctx, start, false); err != nil {
			return err
		}
		if err := s.engine.api().ContainerRename(ctx, next, id); err != nil {
			return err
		}
		start = next
	}
	if err := s.engine.api().ContainerStart(ctx, start, container.StartOptions{}); err != nil {
		return fmt.Errorf("cannot start the service: %w", err)
	}
	return nil
}

// killContainer kills a container. The engine's conflict means that it does not run.
func (s *server) killContainer(ctx context.Context, containerID string) error {
	if err := s.engine.api().ContainerKill(ctx, containerID, "KILL"); !errdefs.IsConflict(err) && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// removeContainer kills and removes a container, if there is one.
func (s *server) removeContainer(ctx context.Context, containerID string, volumes bool) error {
	if containerID == "" {
		return nil
	}
	err := s.engine.api().ContainerRemove(ctx, containerID, container.RemoveOptions{Force: true, RemoveVolumes: volumes})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// settle finishes or undoes what an earlier operation on the service, perhaps of a
// daemon that died, has left half done, and returns the containers that the service
// has then: none, the current one, or that and the next one. The caller holds the lock.
//
// A call of a daemon that died can take effect even after settle looked. So it acts on
// containers by their full id, and keeps the directory of a service that has a current one.
func (s *server) settle(ctx context.Context, id string) (journal, error) {
	all, err := s.ownContainers(ctx, id)
	if err != nil {
		return nil, err
	}
	found := all[id]
	if found[roleCurrent].ID == "" && found[roleGone].ID != "" {
		if err := s.killContainer(ctx, found[roleGone].ID); err != nil {
			return nil, err
		}
		for _, role := range []string{rolePrev, roleNext} {
			if err := s.removeContainer(ctx, found[role].ID, true); err != nil {
				return nil, err
			}
			delete(found, role)
		}
	}
	if err := s.settleNext(ctx, id, found); err != nil {
		return nil, err
	}
	if err := s.settleDirs(ctx, id, found); err != nil {
		return nil, err
	}
	for _, role := range []string{roleNew, roleGone} { // last: they are the journal of all this
		if err := s.removeContainer(ctx, found[role].ID, true); err != nil {
			return nil, err
		}
		delete(found, role)
	}
	return found, nil
}

// settleNext brings the containers of a PATCH, and of the start after it, in order.
func (s *server) settleNext(ctx context.Context, id string, found journal) error {
	if prev := found[rolePrev]; prev.ID != "" {
		if found[roleNext].ID != "" {
			if err := s.removeContainer(ctx, prev.ID, false); err != nil {
				return err
			}
		} else if err := s.engine.api().ContainerRename(ctx, prev.ID, containerName(roleNext, id)); err != nil {
			return err
		} else {
			found[roleNext] = prev
		}
		delete(found, rolePrev)
	}
	if next := found[roleNext]; next.ID != "" && found[roleCurrent].ID == "" {
		if err := s.engine.api().ContainerRename(ctx, next.ID, id); err != nil {
			return err
		}
		next.Names = []string{"/" + id}
		found[roleCurrent] = next
		delete(found, roleNext)
	}
	return nil
}

// settleDirs removes what is left of the service's directories and worthless.
func (s *server) settleDirs(ctx context.Context, id string, found journal) error {
	if err := s.binds.removeLeftovers(ctx, id); err != nil {
		return err
	}
	switch {
	case found[roleCurrent].ID != "":
		return nil
	case found[roleNew].ID != "" || found[roleGone].ID != "":
		return s.binds.remove(ctx, id)
	}
	return s.binds.removeEmpty(id)
}

// settleAll settles every service that has something to settle and no operation under
// way. It logs what it cannot do: the next round tries again.
func (s *server) settleAll(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, s.createTimeout)
	defer cancel()
	ids, err := s.unsettled(ctx)
	if err != nil {
		s.log.Warn("cannot look for unfinished operations", "err", err)
		return
	}
	ended, end := context.WithCancel(ctx)
	end()
	for _, id := range ids {
		unlock, err := s.locks.lock(ended, id)
		if err != nil {
			continue // whoever has the lock settles
		}
		if _, err := s.settle(ctx, id); err != nil {
			s.log.Warn("cannot finish an operation", "id", id, "err", err)
		}
		unlock()
	}
}

// unsettled returns the ids of services that are more than a current container, its
// pending successor, and a directory.
func (s *server) unsettled(ctx context.Context) (ids []string, err error) {
	if err := s.engine.ping(ctx); err != nil {
		return nil, err
	}
	all, err := s.ownContainers(ctx, "")
	if err != nil {
		return nil, err
	}
	for id, found := range all {
		if found[roleCurrent].ID == "" || found[roleNew].ID != "" || found[rolePrev].ID != "" || found[roleGone].ID != "" {
			ids = append(ids, id)
		}
	}
	names, err := s.binds.names()
	for _, name := range names {
		id := strings.TrimPrefix(strings.TrimPrefix(name, stagingPrefix), gonePrefix)
		if serviceID.MatchString(id) && (id != name || all[id] == nil) {
			ids = append(ids, id)
		}
	}
	return ids, err
}

// settleEvery settles all services again and again until ctx ends.
func (s *server) settleEvery(ctx context.Context, interval time.Duration) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			s.settleAll(ctx)
		}
	}
}

// ownContainers returns the containers of this daemon by service, of all or of one. It
// asks again where the engine shows a container under two names, in the middle of a rename.
func (s *server) ownContainers(ctx context.Context, id string) (map[string]journal, error) {
	filter := filters.NewArgs(filters.Arg("label", labelBinds+"="+s.binds.path))
	if id != "" {
		filter.Add("label", labelService+"="+id)
	}
	for range 100 {
		list, err := s.engine.api().ContainerList(ctx, container.ListOptions{All: true, Filters: filter})
		if err != nil {
			return nil, err
		}
		if all, ok := byService(list); ok {
			return all, nil
		}
	}
	return nil, failure(http.StatusBadGateway, "the engine shows a container under two names")
}

// byService sorts containers by service and role. It is not ok if one has two names.
func byService(list []container.Summary) (all map[string]journal, ok bool) {
	all = map[string]journal{}
	for _, c := range list {
		// A name with a second slash is a link that another container has to it.
		c.Names = slices.DeleteFunc(c.Names, func(name string) bool { return strings.Contains(name[1:], "/") })
		if len(c.Names) > 1 {
			return nil, false
		}
		if len(c.Names) == 0 {
			continue // it is being made or removed
		}
		id, role := c.Labels[labelService], roleCurrent
		if name := c.Names[0][1:]; name != id {
			role, _ = strings.CutSuffix(strings.TrimPrefix(name, "duxcore."), "."+id)
		}
		if "/"+containerName(role, id) != c.Names[0] {
			continue // renamed by somebody else
		}
		if all[id] == nil {
			all[id] = journal{}
		}
		all[id][role] = c
	}
	return all, true
}
