package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
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
	roleOther   = "?"    // somebody else gave it another name: it may still use its directory

	labelService = "duxcore.service" // the service's id
	labelBinds   = "duxcore.binds"   // the daemon's bind root: whose service it is
	labelParams  = "duxcore.params"  // the service's serviceParams, as JSON
)

const (
	undoTime = 2 * time.Minute // for undoing a create that failed, whatever became of its request
	lateTime = 5 * time.Second // that the engine may be at work on the last call of a daemon that died
)

// journal holds one service's containers by role. A role that is not there has an empty ID.
type journal map[string]container.Summary

func (j journal) has(role string) bool { return j[role].ID != "" }

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
	return s.change(ctx, p.ID, func(found journal) error {
		if found.has(roleOther) {
			return failure(http.StatusConflict, "service %q has a container that was given another name", p.ID)
		}
		// Somebody else's container of that name is known here, before a download; the renaming decides.
		if c, err := s.engine.api().ContainerInspect(ctx, p.ID); found.has(roleCurrent) || err == nil && c.Name == "/"+p.ID {
			return failure(http.StatusConflict, "there is a container %q already", p.ID)
		}
		if err := s.ensureImage(ctx, p.Image, registryAuth); err != nil {
			return err
		}
		if err := s.binds.make(p.ID, p.owner()); err != nil {
			return err
		}
		err := s.createContents(ctx, p)
		if err != nil {
			undo, cancel := context.WithTimeout(s.life, undoTime)
			defer cancel()
			if _, err := s.settle(undo, p.ID); err != nil {
				s.log.Warn("a failed create is still to be undone", "id", p.ID, "err", err)
			}
		}
		return err
	})
}

// createContents is the part of create that the journal covers.
func (s *server) createContents(ctx context.Context, p serviceParams) error {
	change, cancel := context.WithTimeout(s.life, s.createTimeout)
	defer cancel()
	config, host := s.containerSpec(p)
	created, err := s.engine.api().ContainerCreate(change, config, host, nil, nil, containerName(roleNew, p.ID))
	if errdefs.IsNotFound(err) { // removed again, or a pull that said nothing of its failure
		return failure(http.StatusNotFound, "no image %q", p.Image)
	}
	if err != nil {
		return fmt.Errorf("cannot create the container: %w", err)
	}
	for _, warning := range created.Warnings { // such as a limit that the kernel does not support
		s.log.Warn("the engine created a container with a warning", "id", p.ID, "warning", warning)
	}
	if p.BindContents != "" {
		dir, err := s.binds.root.OpenRoot(p.ID)
		if err != nil {
			return err
		}
		defer dir.Close()
		limits := unpackLimits{bytes: s.maxBindBytes, entries: s.maxBindFiles}
		if err := s.fetch.unpack(ctx, p.BindContents, dir, limits, p.owner()); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return s.engine.api().ContainerRename(change, created.ID, p.ID)
}

// setEnv replaces the service's variables, from the next start on. The container that
// waits for it is made from the service's own params, never from what inspect shows:
// that has the engine's defaults and choices in it. It shares the current one's
// anonymous volumes, which stay anonymous, so that they go with the last container.
func (s *server) setEnv(ctx context.Context, id string, env []string) error {
	return s.change(ctx, id, func(found journal) error {
		if !found.has(roleCurrent) {
			return noSuchService(id)
		}
		current := found[roleCurrent]
		var p serviceParams
		if err := json.Unmarshal([]byte(current.Labels[labelParams]), &p); err != nil {
			return fmt.Errorf("cannot read the label %s of service %q: %w", labelParams, id, err)
		}
		p.Env = env
		config, host := s.containerSpec(p)
		config.Image = current.ImageID // the name may mean another image by now
		host.VolumesFrom = []string{current.ID}
		if found.has(roleNext) {
			if err := s.move(ctx, found, id, roleNext, rolePrev); err != nil {
				return err
			}
		}
		_, err := s.engine.api().ContainerCreate(ctx, config, host, nil, nil, containerName(roleNext, id))
		_, settleErr := s.settle(ctx, id) // removes the earlier next one, or gives it its name back
		if err != nil {
			return fmt.Errorf("cannot create the container with the new environment: %w", err)
		}
		return settleErr
	})
}

// control starts, stops or restarts a service. What holds already is no error.
func (s *server) control(ctx context.Context, id, op string) error {
	return s.change(ctx, id, func(found journal) error {
		if !found.has(roleCurrent) {
			return noSuchService(id)
		}
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
		s.stats.forget(id, nil)
		if op == "stop" {
			return nil
		}
		if found.has(roleNext) {
			if err := s.drop(ctx, found, roleCurrent, false); err != nil {
				return err
			}
			if err := s.move(ctx, found, id, roleNext, roleCurrent); err != nil {
				return err
			}
		}
		err := s.engine.api().ContainerStart(ctx, found[roleCurrent].ID, container.StartOptions{})
		if errdefs.IsNotFound(err) { // of its network, say: trying again would not help
			return fmt.Errorf("cannot start the service: %v", err)
		}
		return err
	})
}

// kill takes no lock: it must not wait behind the stop that it is there to cut short.
func (s *server) kill(ctx context.Context, id string) error {
	current, err := s.lookup(ctx, id)
	if err != nil || !current.State.Running {
		return err
	}
	return s.killContainer(ctx, current.ID)
}

// remove deletes a service with all that belongs to it, or the one of container and
// bind directory that is left.
func (s *server) remove(ctx context.Context, id string) error {
	_, noDir := s.binds.root.Lstat(id) // before settling, which removes an empty one without a container
	return s.change(ctx, id, func(found journal) error {
		if found.has(roleCurrent) {
			if err := s.move(ctx, found, id, roleCurrent, roleGone); err != nil {
				return err
			}
			defer s.stats.forget(id, nil)
			_, err := s.settle(ctx, id)
			return err
		}
		if noDir != nil {
			return noSuchService(id)
		}
		return s.binds.remove(ctx, id)
	})
}

// change runs do under the service's lock, with its settled containers. While the engine
// is still at work on the last call of a daemon that died, names are taken and listed
// containers not found: it does all of it again until that is over, for lateTime at most.
func (s *server) change(ctx context.Context, id string, do func(found journal) error) error {
	unlock, err := s.locks.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	for end := time.Now().Add(lateTime); ; {
		found, err := s.settle(ctx, id)
		if err == nil {
			err = do(found)
		}
		if !errdefs.IsConflict(err) && !errdefs.IsNotFound(err) || time.Now().After(end) || ctx.Err() != nil {
			return err
		}
		time.Sleep(lateTime / 50) // the next list fails if ctx ends meanwhile
	}
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
	if found.has(roleGone) && !found.has(roleCurrent) {
		err = errors.Join(s.killContainer(ctx, found[roleGone].ID),
			s.drop(ctx, found, rolePrev, true), s.drop(ctx, found, roleNext, true))
	} else if found.has(rolePrev) && found.has(roleNext) {
		err = s.drop(ctx, found, rolePrev, false)
	} else if found.has(rolePrev) {
		err = s.move(ctx, found, id, rolePrev, roleNext)
	}
	if err == nil && found.has(roleNext) && !found.has(roleCurrent) {
		if _, noDir := s.binds.root.Lstat(id); noDir == nil {
			err = s.move(ctx, found, id, roleNext, roleCurrent)
		} else { // a dead daemon's PATCH, made after the service was deleted
			err = s.drop(ctx, found, roleNext, true)
		}
	}
	if err == nil {
		err = s.settleDirs(ctx, id, found)
	}
	if err == nil { // last: they are the journal of all this
		err = errors.Join(s.drop(ctx, found, roleNew, true), s.drop(ctx, found, roleGone, true))
	}
	return found, err
}

// settleDirs removes what is left of the service's directories and worthless.
func (s *server) settleDirs(ctx context.Context, id string, found journal) error {
	if err := s.binds.removeGone(ctx, id); err != nil || found.has(roleCurrent) || found.has(roleOther) {
		return err
	}
	if found.has(roleNew) || found.has(roleGone) {
		return s.binds.remove(ctx, id)
	}
	return s.binds.removeEmpty(id)
}

// move gives a container another role.
func (s *server) move(ctx context.Context, found journal, id, from, to string) error {
	c := found[from]
	if err := s.engine.api().ContainerRename(ctx, c.ID, containerName(to, id)); err != nil {
		return fmt.Errorf("cannot rename the container: %w", err)
	}
	delete(found, from)
	c.Names = []string{"/" + containerName(to, id)}
	found[to] = c
	return nil
}

// drop kills and removes the container in a role, if there is one.
func (s *server) drop(ctx context.Context, found journal, role string, volumes bool) error {
	if !found.has(role) {
		return nil
	}
	err := s.engine.api().ContainerRemove(ctx, found[role].ID, container.RemoveOptions{Force: true, RemoveVolumes: volumes})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("cannot remove the container: %w", err)
	}
	delete(found, role)
	return nil
}

// killContainer kills a container. The engine's conflict means that it does not run.
func (s *server) killContainer(ctx context.Context, containerID string) error {
	err := s.engine.api().ContainerKill(ctx, containerID, "KILL")
	if errdefs.IsConflict(err) || errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// settleAll settles every service that has more, or less, than a current container,
// perhaps a next one, and a bind directory, and no operation under way. It logs what
// it cannot do: the next round tries again.
func (s *server) settleAll(ctx context.Context) {
	err := s.engine.ping(ctx)
	var all map[string]journal
	if err == nil {
		all, err = s.ownContainers(ctx, "")
	}
	entries, dirErr := fs.ReadDir(s.binds.root.FS(), ".")
	if err = cmp.Or(err, dirErr); err != nil {
		s.log.Warn("cannot look for unfinished operations", "err", err)
		return
	}
	for _, entry := range entries {
		id := strings.TrimPrefix(entry.Name(), gonePrefix)
		if serviceID.MatchString(id) && (id != entry.Name() || all[id] == nil) {
			all[id] = nil
		}
	}
	ended, end := context.WithCancel(ctx)
	end()
	for id, found := range all {
		if found.has(roleCurrent) && !found.has(roleNew) && !found.has(rolePrev) && !found.has(roleGone) {
			continue
		}
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

// ownContainers returns the containers of this daemon by service, of all or of one. It
// asks again where the engine shows a container under two names, in the middle of a rename.
func (s *server) ownContainers(ctx context.Context, id string) (map[string]journal, error) {
	filter := filters.NewArgs(filters.Arg("label", labelBinds+"="+s.binds.path))
	if id != "" {
		filter.Add("label", labelService+"="+id)
	}
	ctx, cancel := context.WithTimeout(ctx, s.waits.read)
	defer cancel()
	for {
		list, err := s.engine.api().ContainerList(ctx, container.ListOptions{All: true, Filters: filter})
		if err != nil {
			return nil, err
		}
		if all, ok := byService(list); ok {
			return all, nil
		}
		time.Sleep(10 * time.Millisecond) // the next list fails if ctx ends meanwhile
	}
}

// byService sorts containers by service and role. It is not ok if one has two names.
func byService(list []container.Summary) (all map[string]journal, ok bool) {
	all = map[string]journal{}
	for _, c := range list {
		// A name with a second slash is a link that another container has to it.
		c.Names = slices.DeleteFunc(c.Names, func(name string) bool { return strings.Count(name, "/") > 1 })
		if len(c.Names) > 1 {
			return nil, false
		}
		id := c.Labels[labelService]
		if !serviceID.MatchString(id) {
			continue // of an image that somebody gave our labels
		}
		if all[id] == nil {
			all[id] = journal{}
		}
		as := roleOther
		for _, role := range []string{roleCurrent, roleNew, roleNext, rolePrev, roleGone} {
			if slices.Contains(c.Names, "/"+containerName(role, id)) {
				as = role
			}
		}
		all[id][as] = c
	}
	return all, true
}
