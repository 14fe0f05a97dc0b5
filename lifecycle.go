package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
)

// services creates, changes and deletes services. What a service is meant to be is in its record, a file;
// settle reconciles the engine with that. Whatever an operation commits, it commits in the bind root, which
// is durable once it is synced: the engine may lose a container at any time, and settle makes it again.
//
//	name                       meaning                                       written by
//	.services/<id>, a record   what the service is meant to be: see          create, PUT, PATCH, a start that
//	                           serviceRecord. A service exists if it has     applies what is pending;
//	                           a record and no mark                          DELETE removes it
//	.incomplete/<id>, a mark   there is no such service: it is being         create and DELETE, before
//	                           created or deleted, and all that belongs      anything else; both remove
//	                           to it has to be removed                       it last of all
//	container <id>             the service's container; a label has the      a rename of the candidate
//	                           revision of the record that it is made from
//	container                  it may take the place of the service's        create, start, settle
//	duxcore.candidate.<id>     container
//
// The last call of a daemon that was killed may reach the engine at any later time. At worst it takes the
// name that one operation needs, which fails then; the next settle removes what such a call has made.
//
// A keyed mutex holds each service from before an operation looks at its state until it returns. Reads and
// kill do not take it.
type services struct {
	policy     machinePolicy
	limits     unpackLimits
	timeouts   waits
	createTime time.Duration // for one create with its pull and its download

	engine      *engine
	binds       *bindRoot
	containers  *containers
	fetcher     *fetcher
	locks       *keyedMutex // by service id
	ensureImage func(ctx context.Context, p serviceParams, registryAuth string) (imageID string, err error)
	tidyImages  func(ctx context.Context) error // removes what imports of killed daemons have left
	forgetStats func(id string)                 // the next statistics must come from another run or container
	log         *slog.Logger

	ctx context.Context // the daemon's: done when it no longer waits for operations in progress
}

// service is a service as settle leaves it: with a container that was made from its record.
type service struct {
	id          string
	record      serviceRecord
	containerID string
	running     bool
}

// detached returns a context for work that has to finish once it has begun. It does not end when the client
// disconnects, but after the given time, and when the daemon no longer waits for it.
func detached(ctx, daemon context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	stop := context.AfterFunc(daemon, cancel)
	return ctx, func() { stop(); cancel() }
}

// checkRoot returns an error if the engine would not find the bind root, or if its records are missing: if the
// engine has containers of it, its disk is probably not mounted, and settle would remove each of them. A root
// without either is new, and gets its directory of records.
func (s *services) checkRoot(ctx context.Context) error {
	if err := s.binds.check(); err != nil {
		return err
	}
	adopted, err := s.binds.has(recordDir)
	if err != nil || adopted {
		return err
	}
	all, err := s.containers.all(ctx)
	if err != nil {
		return err
	}
	if len(all) > 0 {
		return failure(unavailable, "the bind root has no %s, but the engine has containers of %d services in it: "+
			"is its disk mounted? If the records are lost, create that directory", recordDir, len(all))
	}
	return s.binds.adopt()
}

// lock waits for a service's lock, and returns an error if the bind root cannot be worked with.
func (s *services) lock(ctx context.Context, id string) (unlock func(), err error) {
	unlock, err = s.locks.lock(ctx, id)
	if err != nil {
		return nil, err
	}
	if err := s.checkRoot(ctx); err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// create makes a whole service, or nothing. Until it commits it gives up if the client disconnects.
func (s *services) create(ctx context.Context, p serviceParams, registryAuth string) error {
	unlock, err := s.lock(ctx, p.ID)
	if err != nil {
		return err
	}
	defer unlock()
	spec, err := s.checkCreate(ctx, p, registryAuth)
	if err != nil {
		return err
	}
	err = s.provision(ctx, spec)
	if err == nil {
		return nil
	}
	rollBack, cancel := detached(ctx, s.ctx, s.timeouts.settle)
	defer cancel()
	if _, err := s.settle(rollBack, p.ID); err != nil {
		s.log.Warn("cannot undo a failed create yet", "id", p.ID, "err", err)
	}
	return err
}

// checkCreate returns the spec of a service that can be created: the id is free, and the image is present.
func (s *services) checkCreate(ctx context.Context, p serviceParams, registryAuth string) (serviceSpec, error) {
	settle, cancel := detached(ctx, s.ctx, s.timeouts.settle)
	defer cancel()
	existing, err := s.settle(settle, p.ID)
	if err != nil {
		return serviceSpec{}, err
	}
	taken, err := s.containers.nameTaken(ctx, p.ID)
	if err != nil {
		return serviceSpec{}, err
	}
	if existing != nil || taken {
		return serviceSpec{}, idTaken(p.ID)
	}
	imageID, err := s.ensureImage(ctx, p, registryAuth)
	if err != nil {
		return serviceSpec{}, err
	}
	return serviceSpec{p, imageID}, s.binds.checkUnused(p.ID)
}

// provision makes a service. On an error its mark is left, with which settle takes everything back. ctx is the
// request's; calls that change the engine's state run under a context that is detached from it.
func (s *services) provision(ctx context.Context, spec serviceSpec) error {
	opCtx, cancel := detached(ctx, s.ctx, s.createTime)
	defer cancel()
	id, record := spec.Params.ID, serviceRecord{serviceSpec: spec, Revision: rand.Text()}
	if err := s.binds.mark(id); err != nil {
		return err
	}
	dir, err := s.binds.create(id, spec.Params.bindOwner())
	if err != nil {
		return err
	}
	defer dir.Close()
	candidate, err := s.createCandidate(opCtx, record, "")
	if err != nil {
		return err
	}
	if err := s.fill(ctx, dir, spec.Params); err != nil {
		return err
	}
	err = s.engine.api().ContainerRename(opCtx, candidate, id)
	if errdefs.IsConflict(err) {
		return idTaken(id)
	}
	if err != nil {
		return err
	}
	if err := s.binds.writeRecord(id, record); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil { // the client has disconnected
		return err
	}
	return s.binds.unmark(id) // the commit
}

// fill unpacks bind_contents into a new bind directory, and syncs the directory.
func (s *services) fill(ctx context.Context, dir *os.File, p serviceParams) error {
	if p.BindContents == "" {
		return cmp.Or(dir.Sync(), s.binds.sync("."))
	}
	root, err := s.binds.root.OpenRoot(p.ID)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := s.fetcher.fetch(ctx, p.BindContents, root, s.limits, p.bindOwner()); err != nil {
		return err
	}
	return syncFilesystem(dir)
}

// createCandidate creates the container that a record describes, and returns its id. It shares the anonymous
// volumes of the container that it replaces, if there is one: they stay anonymous that way, and are removed
// with the last container that uses them.
func (s *services) createCandidate(ctx context.Context, r serviceRecord, replaces string) (string, error) {
	config, host := s.policy.containerSpec(r.serviceSpec, r.Revision)
	if replaces != "" {
		host.VolumesFrom = []string{replaces}
	}
	id := r.Params.ID
	created, err := s.engine.api().ContainerCreate(ctx, config, host, nil, nil, candidatePrefix+id)
	if errdefs.IsNotFound(err) { // the image, or the container that it replaces
		if _, err := s.engine.api().ImageInspect(ctx, r.ImageID); errdefs.IsNotFound(err) {
			return "", noSuchImage(r.Params.Image)
		}
	}
	for _, warning := range created.Warnings { // such as a limit that the kernel does not support
		s.log.Warn("the engine created a container with a warning", "id", id, "warning", warning)
	}
	return created.ID, err
}

// setParams replaces a service's parameters from its next start on. Its data stays.
func (s *services) setParams(ctx context.Context, id string, p serviceParams, registryAuth string) error {
	record, err := s.record(id)
	if err != nil {
		return err
	}
	if bindTarget(p.BindDir) != bindTarget(record.Params.BindDir) {
		return badRequest("bind_dir: must be the service's, %q", record.Params.BindDir)
	}
	imageID, err := s.ensureImage(ctx, p, registryAuth) // without the lock: a pull can take long
	if err != nil {
		return err
	}
	return s.setPending(ctx, id, func(serviceSpec) serviceSpec { return serviceSpec{p, imageID} })
}

// setEnv replaces a service's variables from its next start on.
func (s *services) setEnv(ctx context.Context, id string, env []string) error {
	return s.setPending(ctx, id, func(latest serviceSpec) serviceSpec {
		latest.Params.Env = env
		return latest
	})
}

// setPending writes what the next start will run, made from what it would have run. It does not ask the engine:
// a service whose container or image is missing is repaired this way.
func (s *services) setPending(ctx context.Context, id string, change func(latest serviceSpec) serviceSpec) error {
	unlock, err := s.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	record, err := s.record(id)
	if err != nil {
		return err
	}
	pending := change(record.latest())
	pending.Params.BindContents = ""
	record.Pending = &pending
	return s.binds.writeRecord(id, *record) // the commit
}

// record returns the record of a service that exists.
func (s *services) record(id string) (*serviceRecord, error) {
	exists, err := s.binds.exists(id)
	if err != nil {
		return nil, err
	}
	if !exists {
		return nil, noSuchService(id)
	}
	record, err := s.binds.record(id)
	if err == nil && record == nil { // deleted in between
		err = noSuchService(id)
	}
	return record, err
}

// An operation changes a service that exists. It runs under the service's lock, after settle.
type operation func(context.Context, service) error

// change settles a service and runs an operation on it.
func (s *services) change(ctx context.Context, id string, run operation) error {
	unlock, err := s.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	existing, err := s.settle(ctx, id)
	if err != nil {
		return err
	}
	if existing == nil {
		return noSuchService(id)
	}
	return run(ctx, *existing)
}

// start starts a service that does not run.
func (s *services) start(ctx context.Context, svc service) error {
	switch {
	case svc.running:
		return nil
	case svc.record.Pending == nil:
		return s.startContainer(ctx, svc)
	}
	return s.applyPending(ctx, svc)
}

// restart stops a service that runs, and starts it with what is pending, if anything is.
func (s *services) restart(ctx context.Context, svc service) error {
	if svc.record.Pending != nil {
		return s.applyPending(ctx, svc)
	}
	if err := s.stop(ctx, svc); err != nil {
		return err
	}
	return s.startContainer(ctx, svc)
}

// applyPending puts what is pending in force and starts the service. Whatever can fail, such as a bad spec or a
// full disk, fails before the commit, and then the service runs on.
func (s *services) applyPending(ctx context.Context, svc service) error {
	record := svc.record.applied()
	_, err := s.createCandidate(ctx, record, svc.containerID)
	if err == nil {
		err = s.binds.writeRecord(svc.id, record) // the commit
	}
	settled, settleErr := s.settle(ctx, svc.id) // replaces the container; after an error it removes the candidate
	if err := cmp.Or(err, settleErr); err != nil {
		return err
	}
	return s.startContainer(ctx, *settled)
}

// stop stops a service that runs.
func (s *services) stop(ctx context.Context, svc service) error {
	return s.stopContainer(ctx, svc.id, svc.containerID)
}

// stopContainer stops a service's container in the time that the daemon's flag gives it: the container's own
// may be an earlier daemon's.
func (s *services) stopContainer(ctx context.Context, id, containerID string) error {
	defer s.forgetStats(id)
	seconds := int(s.policy.stopTimeout / time.Second)
	return s.engine.api().ContainerStop(ctx, containerID, container.StopOptions{Timeout: &seconds})
}

func (s *services) startContainer(ctx context.Context, svc service) error {
	s.forgetStats(svc.id)
	err := s.engine.api().ContainerStart(ctx, svc.containerID, container.StartOptions{})
	if errdefs.IsInvalidArgument(err) { // such as a bind directory that is missing: not the client's fault
		_, message := describe(err)
		return failure(engineFailed, "%s", message)
	}
	return err
}

// kill kills a service that runs. It does not take the lock: it must not wait behind the stop that it is to
// cut short.
func (s *services) kill(ctx context.Context, id string) error {
	if err := s.checkRoot(ctx); err != nil {
		return err
	}
	current, err := s.containers.lookup(ctx, id)
	if err != nil || !current.State.Running {
		return err
	}
	defer s.forgetStats(id)
	err = s.engine.api().ContainerKill(ctx, current.ID, "KILL")
	if errdefs.IsConflict(err) || errdefs.IsNotFound(err) { // it has exited meanwhile
		return nil
	}
	return err
}

// remove deletes a service with everything that belongs to it, or what is left of one.
func (s *services) remove(ctx context.Context, id string) error {
	unlock, err := s.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.checkRemove(ctx, id); err != nil {
		return err
	}
	if err := s.binds.mark(id); err != nil { // the commit
		return err
	}
	defer s.forgetStats(id)
	_, err = s.settle(ctx, id)
	return err
}

// checkRemove returns an error if there is nothing to delete, or if somebody else's container, or a renamed one,
// may be using the directory.
func (s *services) checkRemove(ctx context.Context, id string) error {
	found, err := s.containers.ofService(ctx, id)
	if err != nil {
		return err
	}
	if err := found.errRenamed(id); err != nil {
		return err
	}
	if found.current != nil {
		return nil
	}
	there, err := s.binds.hasAny(id, recordDir+"/"+id, markDir+"/"+id)
	if err != nil {
		return err
	}
	if !there && found.candidate == nil {
		return noSuchService(id)
	}
	taken, err := s.containers.nameTaken(ctx, id)
	if err == nil && taken {
		err = idTaken(id)
	}
	return err
}

// settle reconciles the engine with a service's record, or finishes or undoes what an earlier operation, perhaps
// of a daemon that was killed, has left half done. It returns the service, or nil if there is none. The caller
// holds the service's lock. It is this table, from the top:
//
//	found                                        done
//	one of ours under any other name             nothing: an error that says so
//	a mark                                       remove all its containers, erase the directory,
//	                                             remove the record, unmark
//	no record                                    remove the candidate, and, if there is no bind
//	                                             directory, the container. A container with a
//	                                             directory is left alone and reported
//	the container has the record's revision      remove the candidate, if there is one
//	no container or candidate has it, and        write the record: what is pending gets in force
//	something is pending                         under a new revision; and on
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
	if !found.candidate.hasRevision(record.Revision) && record.Pending != nil {
		*record = record.applied()
		if err := s.binds.writeRecord(id, *record); err != nil {
			return nil, err
		}
	}
	return s.replace(ctx, *record, found)
}

// purge removes everything that belongs to a marked service. What it has removed is durable before the mark goes.
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

// removeUnrecorded removes the containers of a service that does not exist: a late call has made the candidate, and
// a power cut has brought the container back. But a directory beside the container is somebody's data, perhaps from
// a part of a backup.
func (s *services) removeUnrecorded(ctx context.Context, id string, found serviceContainers) error {
	if err := s.removeContainers(ctx, found.candidate); err != nil || found.current == nil {
		return err
	}
	hasData, err := s.binds.has(id)
	if err != nil {
		return err
	}
	if hasData {
		s.log.Warn("a container has a bind directory and no record: restore the record, or delete the service", "id", id)
		return nil
	}
	return s.removeContainers(ctx, found.current)
}

// replace puts a container of the record's revision in the place of the current one, if there is one. That is stopped
// as every stop does it, and removed by force, since a late call may have started it again.
func (s *services) replace(ctx context.Context, record serviceRecord, found serviceContainers) (*service, error) {
	svc := &service{id: record.Params.ID, record: record}
	current := ""
	if found.current != nil {
		current = found.current.ID
	}
	if found.candidate.hasRevision(record.Revision) {
		svc.containerID = found.candidate.ID
		svc.running = found.candidate.State == container.StateRunning
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

// removeContainers removes containers by force, with their volumes; the engine keeps a volume that another container
// uses. A nil entry stands for a container that does not exist.
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

// keepSettled settles all services, and then again at every interval, until the daemon ends. It returns once the first
// round is done, or has taken as long as an interval: a directory with a million files must not keep the core waiting.
func (s *services) keepSettled(ctx context.Context, background *sync.WaitGroup) {
	first := make(chan struct{})
	background.Go(func() { // ends with s.ctx
		for round := 0; s.ctx.Err() == nil; round++ {
			wait := s.timeouts.round
			if err := s.settleAll(round == 0); err != nil {
				s.log.Warn("cannot settle services", "err", err)
				wait = min(wait, engineRetry) // the engine may be starting too
			}
			if round == 0 {
				close(first)
			}
			select {
			case <-time.After(wait):
			case <-s.ctx.Done():
			}
		}
	})
	select {
	case <-first:
	case <-time.After(s.timeouts.round):
	case <-ctx.Done(): // the daemon was told to stop
	}
}

// engineRetry is how long the daemon waits before it looks for the services again after it could not.
const engineRetry = 2 * time.Second

// settleAll settles every service that needs it, one after the other, each with a deadline of its own. It logs what
// it cannot do; the next round tries again.
func (s *services) settleAll(first bool) error {
	if err := s.engine.negotiate(s.ctx); err != nil {
		return err
	}
	if err := s.checkRoot(s.ctx); err != nil {
		return err
	}
	all, err := s.containers.all(s.ctx)
	if err != nil {
		return err
	}
	if first {
		s.warnOfOtherRoots()
	}
	recorded, err := s.binds.ids(recordDir)
	marked, markErr := s.binds.ids(markDir)
	if err := cmp.Or(err, markErr); err != nil {
		return err
	}
	ids := slices.Concat(slices.Collect(maps.Keys(all)), recorded, marked)
	slices.Sort(ids)
	for _, id := range slices.Compact(ids) {
		if settled, err := s.isSettled(id, all[id]); err != nil || !settled {
			s.settleOne(id)
		}
	}
	return s.tidyImages(s.ctx)
}

// isSettled reports whether settle would have nothing to do, without another call to the engine.
func (s *services) isSettled(id string, found serviceContainers) (bool, error) {
	marked, err := s.binds.marked(id)
	if err != nil || marked || len(found.renamed) > 0 || found.candidate != nil {
		return false, err
	}
	record, err := s.binds.record(id)
	if err != nil {
		return false, err
	}
	if record == nil {
		return found.current == nil, nil
	}
	return found.current.hasRevision(record.Revision), nil
}

// settleOne settles one service, unless an operation holds its lock: that has settled it.
func (s *services) settleOne(id string) {
	done, cancel := context.WithCancel(s.ctx)
	cancel()
	unlock, err := s.locks.lock(done, id)
	if err != nil {
		return
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(s.ctx, s.timeouts.settle)
	defer cancel()
	if _, err := s.settle(ctx, id); err != nil {
		s.log.Warn("cannot settle a service", "id", id, "err", err)
	}
}

// warnOfOtherRoots logs how many services of other bind roots the engine has: perhaps this daemon was started with
// another path than before.
func (s *services) warnOfOtherRoots() {
	roots, err := s.containers.otherRoots(s.ctx)
	if err != nil {
		s.log.Warn("cannot look for services of other bind roots", "err", err)
		return
	}
	services := 0
	for _, count := range roots {
		services += count
	}
	if services > 0 {
		names := strings.Join(slices.Sorted(maps.Keys(roots)), ", ")
		s.log.Warn("the engine has services of other bind roots", "services", services, "roots", names)
	}
}
