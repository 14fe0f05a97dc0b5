package main

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
)

// settle makes the engine match a service's record, or finishes or undoes an operation that was interrupted,
// perhaps by the death of an earlier daemon. It returns the service, or nil if there is none. The caller
// holds the service's lock. The first row that matches counts, except that the fifth goes on with the sixth:
//
//	found                                        done
//	a container of the service under a name      nothing: it is an error
//	that is neither of its two
//	a mark                                       remove all its containers, erase the directory,
//	                                             remove the record, unmark
//	no record                                    remove the candidate. If the service has no bind
//	                                             directory, remove its container too. If it has
//	                                             one, keep the container, and log that
//	the container has the record's revision      remove the candidate, if there is one
//	neither the container nor the candidate has  write the record: what is pending is applied,
//	it, something is pending, and a container    with a new revision; go on
//	is listed, or the engine confirms that none
//	has the name
//	another revision, or no container            make the candidate if none has the record's
//	                                             revision, removing any other; stop and remove
//	                                             the container; rename the candidate to <id>
func (s *services) settle(ctx context.Context, id string) (*service, error) {
	found, err := s.containers.ofService(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := found.errRenamed(id); err != nil {
		return nil, err
	}
	marked, err := s.binds.marked(id)
	if err != nil {
		return nil, err
	}
	if marked {
		return nil, s.purge(ctx, id, found)
	}
	record, err := s.binds.record(id)
	if err != nil {
		return nil, err
	}
	if record == nil {
		return nil, s.removeUnrecorded(ctx, id, found)
	}
	if found.current.hasRevision(record.Revision) {
		running := found.current.State == container.StateRunning
		return &service{id, *record, found.current.ID, running}, s.removeContainers(ctx, found.candidate)
	}
	// An engine that has just started may not list a container that it has, and the service may be running.
	// What is pending must not be applied then; and the rename in replace fails, since the name is taken.
	if !found.candidate.hasRevision(record.Revision) && record.Pending != nil &&
		(found.current != nil || s.containers.isMissing(ctx, id)) {
		*record = record.applied()
		if err := s.binds.writeRecord(id, *record); err != nil {
			return nil, err
		}
	}
	return s.replace(ctx, *record, found)
}

// purge removes everything that belongs to a marked service, and then the mark. Each removal is durable
// before the mark is removed.
func (s *services) purge(ctx context.Context, id string, found serviceContainers) error {
	if err := s.removeContainers(ctx, found.candidate, found.current); err != nil {
		return err
	}
	if err := s.binds.erase(ctx, id); err != nil {
		return err
	}
	if err := s.binds.removeRecord(id); err != nil {
		return err
	}
	return s.binds.unmark(id)
}

// removeUnrecorded removes the containers of a service that does not exist. A late call has made the
// candidate; after a power cut the engine may have the old container again. But if there is a bind directory,
// the record may be missing from a restored backup: then the container stays.
func (s *services) removeUnrecorded(ctx context.Context, id string, found serviceContainers) error {
	if err := s.removeContainers(ctx, found.candidate); err != nil || found.current == nil {
		return err
	}
	hasData, err := s.binds.has(id)
	if err != nil {
		return err
	}
	if hasData {
		s.log.Warn("a container has a bind directory and no record: restore the record, or delete the service",
			"id", id)
		return nil
	}
	return s.removeContainers(ctx, found.current)
}

// replace makes a container of the record's revision the service's. It stops the current one, if any, and
// removes it by force, since a late call may have started it again.
func (s *services) replace(ctx context.Context, record serviceRecord, found serviceContainers) (
	*service, error) {
	svc := &service{id: record.Params.ID, record: record}
	current := ""
	if found.current != nil {
		current = found.current.ID
	}
	if found.candidate.hasRevision(record.Revision) {
		svc.containerID = found.candidate.ID
		svc.running = found.candidate.State == container.StateRunning // somebody may have started it by hand
	} else {
		if err := s.removeContainers(ctx, found.candidate); err != nil {
			return nil, err
		}
		created, err := s.createCandidate(ctx, record, current)
		if err != nil {
			return nil, err
		}
		svc.containerID = created
	}
	if current != "" {
		if err := s.stopContainer(ctx, svc.id, current); err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		if err := s.removeContainers(ctx, found.current); err != nil {
			return nil, err
		}
	}
	return svc, s.engine.api().ContainerRename(ctx, svc.containerID, svc.id)
}

// removeContainers removes containers by force, with their volumes; the engine keeps a volume that another
// container uses. It skips nil entries.
func (s *services) removeContainers(ctx context.Context, entries ...*listEntry) error {
	options := container.RemoveOptions{Force: true, RemoveVolumes: true}
	for _, entry := range entries {
		if entry == nil {
			continue
		}
		err := s.engine.api().ContainerRemove(ctx, entry.ID, options)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// keepSettled settles all services now and at every interval until s.ctx is done. It returns once the first
// round has finished or has taken as long as an interval: deleting a directory of a million files must not
// keep the core waiting.
func (s *services) keepSettled(ctx context.Context, background *sync.WaitGroup) {
	first := make(chan struct{})
	background.Go(func() { // ends when s.ctx is done
		for done := sync.OnceFunc(func() { close(first) }); s.ctx.Err() == nil; {
			wait := s.config.timeouts.settleInterval
			if err := s.settleAll(s.ctx); err != nil {
				s.log.Warn("cannot settle services", "err", err)
				wait = min(wait, engineRetry) // the engine may still be starting
			}
			done()
			select {
			case <-time.After(wait):
			case <-s.ctx.Done():
			}
		}
	})
	select {
	case <-first:
		s.warnOfOtherRoots(ctx)
	case <-time.After(s.config.timeouts.settleInterval):
	case <-ctx.Done(): // shut down before the first round has finished
	}
}

// engineRetry is the wait after a round that failed as a whole.
const engineRetry = 2 * time.Second

// settleAll settles every service that needs it, one after the other, each with its own deadline. It logs the
// services that it cannot settle; the next round tries again.
func (s *services) settleAll(ctx context.Context) error {
	if err := s.engine.negotiate(ctx); err != nil {
		return err
	}
	if err := s.checkRoot(ctx); err != nil {
		return err
	}
	all, err := s.containers.all(ctx)
	if err != nil {
		return err
	}
	recorded, err := s.binds.ids(recordDir)
	if err != nil {
		return err
	}
	marked, err := s.binds.ids(markDir)
	if err != nil {
		return err
	}
	ids := slices.Concat(slices.Collect(maps.Keys(all)), recorded, marked)
	slices.Sort(ids)
	for _, id := range slices.Compact(ids) {
		settled, err := s.isSettled(id, all[id])
		if err == nil && !settled {
			err = s.settleOne(ctx, id)
		}
		if err != nil {
			s.log.Warn("cannot settle a service", "id", id, "err", err)
		}
	}
	if err := s.tidyImages(ctx); err != nil {
		s.log.Warn("cannot remove the tags of unfinished imports", "err", err)
	}
	return nil
}

// isSettled reports whether settle would have nothing to do. It does not call the engine.
func (s *services) isSettled(id string, found serviceContainers) (bool, error) {
	marked, err := s.binds.marked(id)
	if err != nil || marked || len(found.renamed) > 0 || found.candidate != nil {
		return false, err
	}
	record, err := s.binds.record(id)
	if err != nil || record == nil {
		return found.current == nil, err
	}
	return found.current.hasRevision(record.Revision), nil
}

// settleOne settles one service. It skips one whose lock is held: the operation settles it, or else the next
// round does.
func (s *services) settleOne(ctx context.Context, id string) error {
	try, cancel := context.WithTimeout(ctx, lockTry)
	defer cancel()
	unlock, err := s.locks.lock(try, id)
	if err != nil {
		return nil
	}
	defer unlock()
	ctx, cancel = context.WithTimeout(ctx, s.config.timeouts.settle)
	defer cancel()
	if err := s.checkRoot(ctx); err != nil { // it may have moved during the round
		return err
	}
	_, err = s.settle(ctx, id)
	return err
}

// lockTry is how long a round waits for a service's lock.
const lockTry = 10 * time.Millisecond

// warnOfOtherRoots logs how many containers of other bind roots the engine has: this daemon may have been
// started with another path than before.
func (s *services) warnOfOtherRoots(ctx context.Context) {
	list, err := s.containers.list(ctx, filters.Arg("label", labelService))
	if err != nil {
		return // the next round reports an engine that fails
	}
	roots := map[string]int{}
	for _, entry := range list {
		if root := entry.Labels[labelBinds]; root != s.binds.path {
			roots[root]++
		}
	}
	if len(roots) > 0 {
		s.log.Warn("the engine has services of other bind roots", "containers", roots)
	}
}
