package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
)

// The state of a service is in the names of its containers and directories, and nowhere else.
// Ids have no dot, so names with one are the daemon's own. They are its journal: an entry is
// written before what it stands for is begun, and removed after all of that is done, so that
// settle, which reads nothing but names, labels and mounts, can finish or undo what a daemon left
// that died. Whatever cannot be read from this table does not happen.
//
//	name                        meaning                          written by           ended by
//	<id>                        the service: the current         a create's commit,   DELETE
//	                            container                        a start with a next
//	duxcore.new.<id>            a create that has not committed  create               its commit, settle
//	duxcore.next.<id>.<number>  the service with its new         PATCH: its commit    the start that takes it,
//	                            environment, for its next start                       a later PATCH, settle
//	duxcore.now.<id>            a start has chosen this one:     a start's commit     that start, settle
//	                            the current one has to go
//	any other, that mounts      a stray: somebody gave it that   by hand              by hand
//	the service's directory     name; it may use the directory
//	.gone/<id>, its directory   all that belongs to the service  DELETE's commit,     settle, last of all
//	or an empty file            has to go                        a create's undoing
//
// A container with our labels that does not mount the service's directory, such as one made of
// another's docker commit, is nobody's business. Images have such a journal too: see images.tempPrefix.
//
// A create gives its container a random word, its birth, and the number 0; the containers that
// PATCHes make inherit the birth and get higher numbers. The highest number wins. So the last call
// of a daemon that died, which the engine may carry out when its successor has already looked, does
// no harm: what it makes is outnumbered, or of an earlier birth, or takes effect as if it had been
// sent last.
//
// Three contexts say how long something may take:
//   - asked: what the client asked for. It ends when the client leaves, or at its route's limit.
//   - finish: what must be finished once it is begun, which is each call that changes something. It
//     ends at its deadline, or with life; the route table says which requests have one as context.
//   - server.life: the daemon's. It ends when run waits no longer for changes under way.
const (
	nameNew  = "duxcore.new."  // and the id
	nameNext = "duxcore.next." // and the id, a dot, and the number
	nameNow  = "duxcore.now."  // and the id

	labelService = "duxcore.service" // the service's id
	labelBinds   = "duxcore.binds"   // the path of its daemon's bind root
	labelParams  = "duxcore.params"  // its serviceParams, as JSON
	labelBirth   = "duxcore.birth"   // made by its create
	labelNumber  = "duxcore.number"  // decimal

	nameTries = 3               // for a name that a late call may have taken
	lateTime  = 5 * time.Second // how long the engine may still be at work on such a call
)

// journal is what the engine has of one service. A container that is not there is nil.
type journal struct {
	current, new, now *listed
	next, strays      []*listed
}

// waiting returns the container that the next start will take, and those that none will.
func (j journal) waiting() (latest *listed, idle []*listed) {
	for _, c := range j.next {
		if j.current != nil && c.Labels[labelBirth] == j.current.Labels[labelBirth] &&
			number(c) > number(cmp.Or(latest, j.current)) {
			latest, c = c, latest
		}
		if c != nil {
			idle = append(idle, c)
		}
	}
	return latest, idle
}

// number returns a container's number. What is none counts as a create's.
func number(c *listed) int {
	n, _ := strconv.Atoi(c.Labels[labelNumber])
	return n
}

func nextName(id string, number int) string { return fmt.Sprintf("%s%s.%d", nameNext, id, number) }

// create makes all of a service, or nothing.
func (s *server) create(asked context.Context, p serviceParams, registryAuth string) error {
	finish, cancel := context.WithTimeout(s.life, s.createTimeout)
	defer cancel()
	return s.change(asked, finish, p.ID, func(_ context.Context, _ string, current, _ *listed) error {
		taken, _ := s.nameTaken(asked, p.ID) // before a download; if the engine cannot tell, the commit does
		if current != nil || taken {
			return failure(takenID, "there is a container %q already", p.ID)
		}
		if _, err := s.images.ensure(asked, p.Image, p.WorkingDir, registryAuth); err != nil {
			return err
		}
		if err := s.binds.free(p.ID); err != nil {
			return err
		}
		birth := rand.Text()
		err := s.build(asked, finish, p, birth)
		if err != nil {
			s.undo(p.ID, birth)
		}
		return err
	})
}

// build is the part of a create that is undone if it fails.
func (s *server) build(asked, finish context.Context, p serviceParams, birth string) error {
	dir, err := s.binds.ensure(p.ID, p.bindOwner())
	if err != nil {
		return err
	}
	defer dir.Close()
	containerID, err := s.makeNew(finish, p, birth)
	if err == nil && p.BindContents != "" {
		if err = s.unpackContents(asked, p); err == nil {
			err = syncFilesystem(dir)
		}
	}
	if err == nil {
		err = cmp.Or(dir.Sync(), s.binds.dir.Sync(), asked.Err())
	}
	if err == nil {
		err = s.engine.api().ContainerRename(finish, containerID, p.ID) // the commit
		if errdefs.IsConflict(err) {
			err = failure(takenID, "there is a container %q already", p.ID)
		}
	}
	return err
}

// makeNew makes the container of a create. What has its name already was made by a dead daemon's
// late call, and is worth nothing; or is still being made, and not shown yet, though it has the name.
func (s *server) makeNew(finish context.Context, p serviceParams, birth string) (id string, err error) {
	config, host := s.containerSpec(p, birth, 0)
	for end := time.Now().Add(lateTime); ; {
		created, err := s.engine.api().ContainerCreate(finish, config, host, nil, nil, nameNew+p.ID)
		if errdefs.IsConflict(err) && time.Now().Before(end) {
			all, err := s.ownContainers(finish, p.ID)
			if err = cmp.Or(err, s.drop(finish, false, all[p.ID].new)); err != nil {
				return "", err
			}
			if all[p.ID].new == nil {
				time.Sleep(lateTime / 100) // the next call fails if finish ends meanwhile
			}
			continue
		}
		if errdefs.IsConflict(err) { // with what is being made, unless somebody else has that name
			if taken, _ := s.nameTaken(finish, nameNew+p.ID); !taken {
				err = errUnderWay
			}
		}
		if errdefs.IsNotFound(err) { // removed again, or a pull that said nothing of its failure
			err = noSuchImage(p.Image)
		}
		for _, warning := range created.Warnings { // such as a limit that the kernel does not support
			s.log.Warn("the engine created a container with a warning", "id", p.ID, "warning", warning)
		}
		return created.ID, err
	}
}

// unpackContents fills the bind directory. A part of it may be there after an error: undo takes that.
func (s *server) unpackContents(asked context.Context, p serviceParams) error {
	root, err := s.binds.root.OpenRoot(p.ID)
	if err != nil {
		return err
	}
	defer root.Close()
	limits := unpackLimits{s.maxBindBytes, s.maxBindFiles}
	return s.fetcher.fetch(asked, p.BindContents, root, limits, p.bindOwner())
}

// undo gives a create up as a DELETE would delete it: its commit may have failed, and come still. A
// service of another birth, which the engine has not listed before, keeps its container and directory.
func (s *server) undo(id, birth string) {
	finish, cancel := context.WithTimeout(s.life, s.waits.settle)
	defer cancel()
	all, err := s.ownContainers(finish, id)
	if c := all[id].current; err == nil && (c == nil || c.Labels[labelBirth] == birth) {
		err = s.binds.discard(id)
	}
	if err == nil {
		_, _, err = s.settle(finish, id)
	}
	if err != nil {
		s.log.Warn("a failed create is still to be undone", "id", id, "err", err)
	}
}

// setEnv replaces the service's variables, from the next start on. The container that waits for
// it is made from the service's own params, never from what inspect shows: that has the engine's
// defaults and choices in it. It shares the current one's anonymous volumes, which stay
// anonymous, so that they go with the last container.
func (s *server) setEnv(finish context.Context, id string, env []string) error {
	change := func(_ context.Context, _ string, current, next *listed) error {
		var p serviceParams
		if err := json.Unmarshal([]byte(current.Labels[labelParams]), &p); err != nil {
			return fmt.Errorf("cannot read the label %s of service %q: %w", labelParams, id, err)
		}
		p.Env = env
		for try := 1; ; try++ {
			n := number(cmp.Or(next, current)) + try // a dead daemon's late call may have the one before
			config, host := s.containerSpec(p, current.Labels[labelBirth], n)
			config.Image = current.ImageID // the name may mean another image by now
			host.VolumesFrom = []string{current.ID}
			_, err := s.engine.api().ContainerCreate(finish, config, host, nil, nil, nextName(id, n))
			if err == nil { // it was the commit
				_, _, err = s.settle(finish, id) // removes the next one that is outnumbered now
				return err
			}
			if errdefs.IsNotFound(err) { // the image, or current, which somebody has just removed
				if _, err := s.engine.api().ImageInspect(finish, current.ImageID); errdefs.IsNotFound(err) {
					return noSuchImage(current.ImageID)
				}
			}
			if !errdefs.IsConflict(err) || try == nameTries {
				return err
			}
		}
	}
	return s.changeExisting(finish, id, change)
}

// start starts a service that does not run.
func (s *server) start(finish context.Context, id string, current, next *listed) error {
	switch {
	case current.State == container.StateRunning:
		return nil
	case next == nil:
		return s.startContainer(finish, id, current)
	}
	return s.restart(finish, id, current, next) // somebody may have paused it, say
}

// restart stops a service that runs, and starts it, or what waits for that in its place.
func (s *server) restart(finish context.Context, id string, current, next *listed) error {
	if err := s.stop(finish, id, current, next); err != nil {
		return err
	}
	if next == nil {
		return s.startContainer(finish, id, current)
	}
	if err := s.engine.api().ContainerRename(finish, next.ID, nameNow+id); err != nil { // the commit
		return err
	}
	if _, _, err := s.settle(finish, id); err != nil {
		return err
	}
	return s.startContainer(finish, id, next)
}

// stop stops a service that runs.
func (s *server) stop(finish context.Context, id string, current, _ *listed) error {
	defer s.stats.forget(id, nil)
	seconds := int(s.stopTimeout / time.Second) // the container's own may be an earlier daemon's
	return s.engine.api().ContainerStop(finish, current.ID, container.StopOptions{Timeout: &seconds})
}

// startContainer starts a container, and lets no statistics of what ran before it follow.
func (s *server) startContainer(finish context.Context, id string, c *listed) error {
	s.stats.forget(id, nil)
	return s.engine.api().ContainerStart(finish, c.ID, container.StartOptions{})
}

// kill kills a service that runs. It takes no lock while there is a current container: it must not
// wait behind the stop that it is there to cut short.
func (s *server) kill(finish context.Context, id string) error {
	current, err := s.lookup(finish, id)
	if err != nil || !current.State.Running {
		return err
	}
	err = s.engine.api().ContainerKill(finish, current.ID, "KILL")
	if errdefs.IsConflict(err) || errdefs.IsNotFound(err) { // it has ended meanwhile
		return nil
	}
	return err
}

// removeService deletes a service with all that belongs to it, or the one of container and bind directory
// that is left.
func (s *server) removeService(finish context.Context, id string, current, _ *listed) error {
	if current == nil {
		if there, err := s.binds.has(id); err != nil || !there {
			return cmp.Or(err, noSuchService(id))
		}
		if taken, err := s.nameTaken(finish, id); err != nil || taken {
			return cmp.Or(err, failure(takenID, "there is a container %q already", id))
		}
	}
	if err := s.binds.discard(id); err != nil { // the commit
		return err
	}
	defer s.stats.forget(id, nil)
	_, _, err := s.settle(finish, id)
	return err
}

// An operation changes a service under its lock, with the containers that settling has left of it.
type operation func(finish context.Context, id string, current, next *listed) error

// change waits for the service's lock, settles the service, and does an operation.
func (s *server) change(asked, finish context.Context, id string, do operation) error {
	unlock, err := s.locks.lock(asked, id)
	if err != nil {
		return err
	}
	defer unlock()
	current, next, err := s.settle(finish, id)
	if err != nil {
		return err
	}
	return do(finish, id, current, next)
}

// changeExisting does an operation on a service that there is.
func (s *server) changeExisting(finish context.Context, id string, do operation) error {
	return s.change(finish, finish, id, func(finish context.Context, id string, current, next *listed) error {
		if current == nil {
			return noSuchService(id)
		}
		return do(finish, id, current, next)
	})
}

// settle finishes or undoes what an earlier operation on the service, perhaps of a daemon that
// died, has left half done. It returns what the service has then: nothing, or a current container
// and perhaps a next. The caller holds the service's lock. It reads as this table, from the top:
//
//	found                                              done
//	a stray                                            nothing: an error that names it
//	new, and neither current nor now nor .gone         the directory becomes .gone/<id>, and on
//	.gone                                              remove all containers, then .gone/<id>; done
//	any other new                                      remove it
//	now                                                remove the current one, rename now to <id>
//	a next of another birth than the current one, of   remove it
//	no higher number, or outnumbered by another; any
//	without a current one
func (s *server) settle(finish context.Context, id string) (current, next *listed, err error) {
	all, err := s.ownContainers(finish, id)
	gone, goneErr := s.binds.has(goneDir + "/" + id)
	if err = cmp.Or(err, goneErr); err != nil {
		return nil, nil, err
	}
	found := all[id]
	if len(found.strays) > 0 {
		name := strings.Join(found.strays[0].Names, " ")
		return nil, nil, failure(renamed, "service %q has a container that was given another name: %q", id, name)
	}
	if found.new != nil && found.current == nil && found.now == nil && !gone {
		if err := s.binds.discard(id); err != nil {
			return nil, nil, err
		}
		gone = true
	}
	if gone {
		err := s.drop(finish, true, append(found.next, found.new, found.now, found.current)...)
		if err == nil {
			err = s.binds.erase(finish, id)
		}
		return nil, nil, err
	}
	err = s.drop(finish, false, found.new)
	if err == nil && found.now != nil {
		// By force: it was stopped before the commit. If it runs again, by a dead daemon's late call or
		// by hand, it is the service no more, and must not keep the chosen one from its place.
		if err = s.drop(finish, true, found.current); err == nil {
			err = s.engine.api().ContainerRename(finish, found.now.ID, id)
		}
		found.current = found.now
	}
	latest, idle := found.waiting()
	if err == nil {
		err = s.drop(finish, false, idle...)
	}
	return found.current, latest, err
}

// drop removes containers, of which some may be nil, with their volumes: the engine keeps what
// another one uses. Where the engine is at that already, for a daemon that died, drop waits for it.
func (s *server) drop(finish context.Context, force bool, containers ...*listed) error {
	options := container.RemoveOptions{Force: force, RemoveVolumes: true}
	for _, c := range containers {
		if c == nil {
			continue
		}
		err := s.engine.api().ContainerRemove(finish, c.ID, options)
		if errdefs.IsConflict(err) && (force || c.State == container.StateRemoving) { // else it runs
			wait, cancel := context.WithTimeout(finish, s.waits.read) // what fails there may not be told
			defer cancel()
			removed, failed := s.engine.api().ContainerWait(wait, c.ID, container.WaitConditionRemoved)
			select {
			case end := <-removed:
				if err = nil; end.Error != nil {
					err = errors.New("engine: " + end.Error.Message)
				}
			case err = <-failed:
			}
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// settleRound settles each service and import that has something to be finished or undone: all at
// the same time and each with its own deadline, so that none that hangs holds up the others. It logs
// what it cannot do, which the next round tries again, and returns an error if it cannot look.
func (s *server) settleRound() error {
	names, err := s.unsettled()
	if err != nil {
		s.log.Warn("cannot look for unfinished operations", "err", err)
	}
	ended, end := context.WithCancel(s.life)
	end()
	var all sync.WaitGroup
	for _, name := range names {
		unlock, err := s.locks.lock(ended, name)
		if err != nil {
			continue // whoever has the lock settles
		}
		all.Go(func() { // ends with finish
			defer unlock()
			finish, cancel := context.WithTimeout(s.life, s.waits.settle)
			defer cancel()
			if strings.HasPrefix(name, importName) {
				err = s.images.dropImport(finish, name)
			} else {
				_, _, err = s.settle(finish, name)
			}
			if err != nil {
				s.log.Warn("cannot finish an operation", "name", name, "err", err)
			}
		})
	}
	all.Wait()
	return err
}

// unsettled returns the ids of the services for which settle has something to do, and the names of
// imports.
func (s *server) unsettled() (names []string, err error) {
	if err := s.meetEngine(s.life); err != nil {
		return nil, err
	}
	all, err := s.ownContainers(s.life, "")
	if err != nil {
		return nil, err
	}
	for id, found := range all {
		if _, idle := found.waiting(); found.new != nil || found.now != nil || len(idle) > 0 {
			names = append(names, id)
		}
	}
	gone, goneErr := s.binds.allGone()
	imports, err := s.images.unfinishedImports()
	return slices.Concat(names, gone, imports), cmp.Or(goneErr, err)
}
