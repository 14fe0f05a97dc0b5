package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
)

// services creates, changes and deletes services. A service's record, a file, has its parameters; settle
// makes the engine match it. Every operation that changes the record, or creates or deletes the service,
// commits by a change to the bind root, which is synced before the answer. The engine may lose a container at
// any time; settle makes it again.
//
//	name                       meaning                                       written by
//	.services/<id>, a record   the service's parameters: see serviceRecord.  create, PUT, PATCH, a start that
//	                           A service exists if it has a record and       applies what is pending;
//	                           no mark                                       DELETE removes it
//	.incomplete/<id>, a mark   the service does not exist: it is being       create and DELETE, as their
//	                           created or deleted, and everything that       first step; both remove it
//	                           belongs to it must be removed                 as their last
//	container <id>             the service's container; a label has the      a rename of the candidate
//	                           revision of the record it was made from
//	container                  it may replace the service's container        create, start, settle
//	duxcore.candidate.<id>
//
// The last call of a daemon that was killed may reach the engine at any later time. A late create or rename
// may take a name that an operation needs: the operation fails, and the next settle removes what the call has
// made.
// A late start, stop or kill changes whether the service runs, even after a later request was answered.
//
// An operation holds the service's lock, of a keyedMutex, from before it looks at the service's state until
// it returns; a PUT only once it has its image (see setParams). Reads and kill take the lock only if the
// engine does not give them the service's container (see lookup).
type services struct {
	config     config
	engine     *engine
	binds      *bindRoot
	containers *containers
	fetcher    *fetcher
	locks      *keyedMutex // by service id
	log        *slog.Logger

	// ensureImage, holdImage and tidyImages are methods of images; forgetStats discards the
	// statistics of what ran before a change.
	ensureImage func(ctx context.Context, p serviceParams, registryAuth string) (checkedImage, error)
	holdImage   func(ctx context.Context, spec serviceSpec) (release func(), err error)
	tidyImages  func(ctx context.Context) error
	forgetStats func(id string)

	ctx context.Context // done when the daemon no longer waits for operations in progress
}

// service is what settle has found or made: its container was made from its record.
type service struct {
	id          string
	record      serviceRecord
	containerID string
	running     bool
}

// detached returns a context for work that must finish once it has started. It ends after timeout, or when
// daemon is done, but not when the client disconnects.
func detached(ctx, daemon context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	stop := context.AfterFunc(daemon, cancel)
	return ctx, func() { stop(); cancel() }
}

// checkRoot returns an error if the bind root's path leads elsewhere, or if its records are missing although
// the engine has containers of it: its disk is probably not mounted, and settle would remove the containers.
// A root with neither is new, and gets its directory of records.
func (s *services) checkRoot(ctx context.Context) error {
	err := s.binds.checkRecords()
	if !errors.Is(err, errNoRecords) { // or is nil
		return err
	}
	all, err := s.containers.all(ctx)
	if err != nil {
		return err
	}
	if len(all) > 0 {
		return newAPIError(kindUnavailable, "the bind root has no %s, but the engine has containers of %d "+
			"services in it: is its disk mounted? If the records are lost, create that directory", recordDir, len(all))
	}
	return s.binds.adopt()
}

// lock waits for a service's lock, and returns an error if the bind root is not usable, see checkRoot.
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

// create makes a whole service, or nothing. If the client disconnects before the commit, it is rolled back.
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
	rollBack, cancel := detached(ctx, s.ctx, s.config.timeouts.settle)
	defer cancel()
	if _, undoErr := s.settle(rollBack, p.ID); undoErr != nil {
		s.log.Warn("cannot undo a failed create; the next round tries again", "id", p.ID, "err", undoErr)
	}
	return err
}

// checkCreate makes sure that the id is free and the image present, and returns the spec of the new service.
func (s *services) checkCreate(ctx context.Context, p serviceParams, registryAuth string) (
	serviceSpec, error) {
	settleCtx, cancel := detached(ctx, s.ctx, s.config.timeouts.settle)
	defer cancel()
	existing, err := s.settle(settleCtx, p.ID)
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
	image, err := s.ensureImage(ctx, p, registryAuth)
	if err != nil {
		return serviceSpec{}, err
	}
	return serviceSpec{p, image.id, image.user}, s.binds.checkUnused(p.ID)
}

// provision makes a service. After an error its mark is left, and settle removes everything. The exception:
// if the removal of the mark cannot be synced, the service may exist. ctx is the request's; calls that change
// the engine's state run under a context that is detached from it.
func (s *services) provision(ctx context.Context, spec serviceSpec) error {
	opCtx, cancel := detached(ctx, s.ctx, s.config.createTimeout)
	defer cancel()
	id, record := spec.Params.ID, serviceRecord{serviceSpec: spec, UID: rand.Text(), Revision: rand.Text()}
	if err := s.binds.mark(id); err != nil {
		return err
	}
	dir, err := s.binds.create(id, spec.bindOwner())
	if err != nil {
		return err
	}
	defer dir.Close()
	// Before the download: a bad spec fails early, and from here on the engine answers images.removeUnused
	// with a conflict, so that a create does not need holdImage.
	candidate, err := s.createCandidate(opCtx, record, "")
	if err != nil {
		return err
	}
	if err := s.fill(ctx, dir, spec); err != nil {
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
	if err := ctx.Err(); err != nil { // the client has disconnected, or the time is over
		return err
	}
	return s.binds.unmark(id) // the commit
}

// fill unpacks bind_contents into a new bind directory, and makes the directory durable.
func (s *services) fill(ctx context.Context, dir *os.File, spec serviceSpec) error {
	p := spec.Params
	if p.BindContents == "" {
		return cmp.Or(dir.Sync(), s.binds.dir.Sync()) // calls both, and returns the first error
	}
	root, err := s.binds.root.OpenRoot(p.ID)
	if err != nil {
		return err
	}
	defer root.Close()
	limits := unpackLimits{s.config.maxBindBytes, s.config.maxBindFiles}
	if err := s.fetcher.fetch(ctx, p.BindContents, root, limits, spec.bindOwner()); err != nil {
		return err
	}
	return syncFilesystem(dir)
}

// createCandidate creates the container that a record describes, and returns its id. The container shares the
// anonymous volumes of the one that it replaces, if any: so they stay anonymous, and the engine removes them
// with the last container that uses them. VolumesFrom carries the bind mount along, too: see setPending.
func (s *services) createCandidate(ctx context.Context, r serviceRecord, replaces string) (string, error) {
	config, host := containerSpec(s.config, r)
	if replaces != "" {
		host.VolumesFrom = []string{replaces}
	}
	id := r.Params.ID
	created, err := s.engine.api().ContainerCreate(ctx, config, host, nil, nil, candidatePrefix+id)
	if errdefs.IsNotFound(err) { // either the image or the replaced container is missing
		if _, err := s.engine.api().ImageInspect(ctx, r.ImageID); errdefs.IsNotFound(err) {
			return "", noSuchImage(r.Params.Image)
		}
	}
	for _, warning := range created.Warnings { // for example, of a limit that the kernel does not support
		s.log.Warn("the engine created a container with a warning", "id", id, "warning", warning)
	}
	return created.ID, err
}

// setParams replaces a service's parameters from its next start on. The data stays. The image is checked, and
// pulled if it is missing, without the lock, since a pull may take long. Meanwhile the id may become that of
// another service: then the UID differs.
func (s *services) setParams(ctx context.Context, id string, p serviceParams, registryAuth string) error {
	seen, err := s.record(id)
	if err != nil {
		return err
	}
	image, err := s.ensureImage(ctx, p, registryAuth)
	if err != nil {
		return err
	}
	return s.setPending(ctx, id, func(record serviceRecord) (serviceSpec, error) {
		if record.UID != seen.UID {
			return serviceSpec{}, noSuchService(id)
		}
		return serviceSpec{p, image.id, image.user}, nil
	})
}

// setEnv replaces a service's variables from its next start on.
func (s *services) setEnv(ctx context.Context, id string, env []string) error {
	return s.setPending(ctx, id, func(record serviceRecord) (serviceSpec, error) {
		spec := record.latest()
		spec.Params.Env = env
		return spec, nil
	})
}

// setPending changes the spec that the next start will run. It does not ask the engine for containers, so
// that it can repair a service whose container or image is missing.
func (s *services) setPending(ctx context.Context, id string,
	change func(serviceRecord) (serviceSpec, error)) error {
	unlock, err := s.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	record, err := s.record(id)
	if err != nil {
		return err
	}
	pending, err := change(*record)
	if err != nil {
		return err
	}
	if bindTarget(pending.Params.BindDir) != bindTarget(record.Params.BindDir) {
		// VolumesFrom would carry the old mount along.
		return badRequest("bind_dir: must be the service's, %q", record.Params.BindDir)
	}
	if pending.ImageID != record.latest().ImageID {
		release, err := s.holdImage(ctx, pending)
		if err != nil {
			return err
		}
		defer release()
	}
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
	if err == nil && record == nil { // deleted meanwhile
		err = noSuchService(id)
	}
	return record, err
}

// An operation changes a service that exists. It runs under the service's lock, after settle.
type operation func(context.Context, service) error

// change settles a service and runs an operation on it. ctx, the route's, limits the wait for the lock. The
// rest gets a new context, with the time that a stop and a start may take: it must not end between them.
func (s *services) change(ctx context.Context, id string, run operation) error {
	unlock, err := s.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	ctx, cancel := detached(ctx, s.ctx, s.config.stopTimeout+s.config.timeouts.engineRead)
	defer cancel()
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

// restart stops a service if it runs, and starts it, with what is pending if anything is.
func (s *services) restart(ctx context.Context, svc service) error {
	if svc.record.Pending != nil {
		return s.applyPending(ctx, svc)
	}
	if err := s.stop(ctx, svc); err != nil {
		return err
	}
	return s.startContainer(ctx, svc)
}

// applyPending applies what is pending and starts the service. If the engine refuses the new container, or
// the disk is full, nothing is committed and the service stays as it was; but if only the sync of the
// record fails, the service may have been stopped, with its new parameters. After the commit, a failure
// such as a taken port, or a kill of the daemon, leaves the service stopped. The old container may run on
// until the next round, in which settle stops and replaces it: settle starts nothing.
func (s *services) applyPending(ctx context.Context, svc service) error {
	record := svc.record.applied()
	_, err := s.createCandidate(ctx, record, svc.containerID)
	if err == nil {
		err = s.binds.writeRecord(svc.id, record) // the commit
	}
	// This replaces the container (the table's last row) or, if the record was not written, removes the
	// candidate (its fourth).
	settled, settleErr := s.settle(ctx, svc.id)
	if err := cmp.Or(err, settleErr); err != nil {
		return err
	}
	if settled == nil { // somebody has removed the record
		return noSuchService(svc.id)
	}
	return s.startContainer(ctx, *settled)
}

// stop stops a service if it runs.
func (s *services) stop(ctx context.Context, svc service) error {
	return s.stopContainer(ctx, svc.id, svc.containerID)
}

// stopContainer stops a service's container within -stop-timeout: the container's own StopTimeout may be that
// of an earlier daemon.
func (s *services) stopContainer(ctx context.Context, id, containerID string) error {
	defer s.forgetStats(id)
	seconds := int(s.config.stopTimeout / time.Second)
	return s.engine.api().ContainerStop(ctx, containerID, container.StopOptions{Timeout: &seconds})
}

// startContainer starts a service's container. Its errors distinguish what the client can fix from what it
// cannot.
func (s *services) startContainer(ctx context.Context, svc service) error {
	s.forgetStats(svc.id)
	err := s.engine.api().ContainerStart(ctx, svc.containerID, container.StartOptions{})
	if err == nil {
		return nil
	}
	_, message := describe(err)
	if portInUse.MatchString(message) {
		return newAPIError(kindPortTaken, "%s", message)
	}
	// Only a cmd that cannot be executed is the client's fault; a missing bind directory, for example, is not.
	if errdefs.IsInvalidArgument(err) && !strings.Contains(message, `exec: "`) {
		return newAPIError(kindEngineFailed, "%s", message)
	}
	return err
}

// portInUse matches the errors of engines 20.10 to 29 for a port of the host that a program or a container
// has taken.
var portInUse = regexp.MustCompile(`address already in use|port is already allocated`)

// kill kills a service if it runs. It does not take the lock of a service that has its container, or it would
// wait for the stop that it is meant to cut short.
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
	if errdefs.IsConflict(err) || errdefs.IsNotFound(err) { // it has exited
		return nil
	}
	return err
}

// remove deletes a service, or the rest of one, with everything that belongs to it.
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

// checkRemove returns an error if there is nothing to delete, or if a renamed container or a container that
// is not ours may be using the directory.
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
	exists := found.candidate != nil
	for _, name := range []string{id, recordDir + "/" + id, markDir + "/" + id} {
		there, err := s.binds.has(name)
		if err != nil {
			return err
		}
		exists = exists || there
	}
	if !exists {
		return noSuchService(id)
	}
	taken, err := s.containers.nameTaken(ctx, id)
	if err == nil && taken {
		err = idTaken(id)
	}
	return err
}
