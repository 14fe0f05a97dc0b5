package main

import (
	"bytes"
	"cmp"
	"context"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
)

// createBody is the body of POST and PUT.
type createBody struct {
	Type   string        `json:"type"`
	Params serviceParams `json:"params"`
}

// readParams reads and checks the parameters of a service.
func readParams(r *http.Request) (serviceParams, error) {
	var body createBody
	if err := readJSON(r, &body); err != nil {
		return serviceParams{}, err
	}
	if body.Type != "raw" {
		return serviceParams{}, badRequest(`type: must be "raw"`)
	}
	return body.Params, body.Params.check()
}

// handleCreate answers POST /service.
func (s *services) handleCreate(w http.ResponseWriter, r *http.Request) error {
	params, err := readParams(r)
	noteChange(w, truncate(params.ID), "create")
	if err != nil {
		return err
	}
	if err := s.create(r.Context(), params, r.Header.Get("X-Registry-Auth")); err != nil {
		return err
	}
	w.Header().Set("Location", "/service/"+params.ID)
	return nil
}

// handlePut answers PUT /service/{id}.
func (s *services) handlePut(w http.ResponseWriter, r *http.Request) error {
	noteChange(w, r.PathValue("id"), "put")
	params, err := readParams(r)
	if err != nil {
		return err
	}
	if params.ID != r.PathValue("id") {
		return badRequest("id: must be the one in the path, %q", r.PathValue("id"))
	}
	if params.BindContents != "" {
		return badRequest("bind_contents: only a create unpacks an archive")
	}
	return s.setParams(r.Context(), params.ID, params, r.Header.Get("X-Registry-Auth"))
}

// setParams replaces a service's parameters from its next start on. The data stays. The image is checked, and
// pulled if it is missing, without the lock, since a pull may take long. Meanwhile the id may become that of
// another service: then the UID differs.
func (s *services) setParams(ctx context.Context, id string, p serviceParams, registryAuth string) error {
	seen, err := s.record(id)
	if err != nil {
		return err
	}
	spec, err := s.ensureImage(ctx, p, registryAuth)
	if err != nil {
		return err
	}
	return s.setPending(ctx, id, func(record serviceRecord) (serviceSpec, error) {
		if record.UID != seen.UID {
			return serviceSpec{}, noSuchService(id)
		}
		return spec, nil
	})
}

// handleSetEnv answers PATCH /service/{id}/env.
func (s *services) handleSetEnv(w http.ResponseWriter, r *http.Request) error {
	noteChange(w, r.PathValue("id"), "env")
	var body map[string]any
	if err := readJSON(r, &body); err != nil {
		return err
	}
	env := make([]string, 0, len(body))
	for _, name := range slices.Sorted(maps.Keys(body)) {
		value, ok := body[name].(string)
		if name == "" || !ok || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			return badRequest("%q: must be a name without = and NUL, its value a string without NUL", name)
		}
		env = append(env, name+"="+value)
	}
	return s.setEnv(r.Context(), r.PathValue("id"), env)
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

// handleParams answers GET /service/{id}/params with the parameters of the service's record.
func (s *services) handleParams(w http.ResponseWriter, r *http.Request) error {
	record, err := s.record(r.PathValue("id"))
	if err != nil {
		return err
	}
	body := struct {
		Params  serviceParams  `json:"params"`
		Pending *serviceParams `json:"pending,omitempty"`
	}{Params: record.Params}
	if record.Pending != nil {
		body.Pending = &record.Pending.Params
	}
	writeJSON(w, http.StatusOK, body)
	return nil
}

// handleList answers GET /service with the engine's list, of this daemon's services alone. One broken service
// must not be an error for all: it is left out, and logged.
func (s *services) handleList(w http.ResponseWriter, r *http.Request) error {
	if err := s.checkRoot(r.Context()); err != nil {
		return err
	}
	all, err := s.containers.all(r.Context())
	if err != nil {
		return err
	}
	ids, err := s.binds.existing()
	if err != nil {
		return err
	}
	if all, err = s.awaitContainers(r.Context(), ids, all); err != nil {
		return err
	}
	list := make([][]byte, 0, len(ids))
	for _, id := range ids {
		if entry := all[id].current; entry != nil {
			list = append(list, entry.raw)
		} else {
			s.log.Warn("a service was left out of the list: it has no container of its name", "id", id)
		}
	}
	writeBytes(w, http.StatusOK, slices.Concat([]byte("["), bytes.Join(list, []byte(",")), []byte("]\n")))
	return nil
}

// awaitContainers returns all if that has a container of every service. Otherwise a start may be replacing
// one: it waits for operations on the services without one, for a third of engineRead, and lists again.
func (s *services) awaitContainers(ctx context.Context, ids []string, all map[string]serviceContainers) (
	map[string]serviceContainers, error) {
	waiting, cancel := context.WithTimeout(ctx, s.config.timeouts.engineRead/3)
	defer cancel()
	missing := false
	for _, id := range ids {
		if all[id].current != nil {
			continue
		}
		missing = true
		if unlock, err := s.locks.lock(waiting, id); err == nil {
			defer unlock() // not before the second list: another start could come in between
		}
	}
	if !missing {
		return all, nil
	}
	return s.containers.all(ctx)
}

// handleInspect answers GET /service/{id} with the engine's answer, byte for byte.
func (s *services) handleInspect(w http.ResponseWriter, r *http.Request) error {
	current, err := s.containers.lookup(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	writeBytes(w, http.StatusOK, current.raw)
	return nil
}

// handleControl answers POST /service/{id}/ctl.
func (s *services) handleControl(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Op string `json:"op"`
	}
	if err := readJSON(r, &body); err != nil {
		return err
	}
	ctx, id := r.Context(), r.PathValue("id")
	run, takesLock := map[string]operation{"start": s.start, "stop": s.stop, "restart": s.restart}[body.Op]
	if !takesLock && body.Op != "kill" {
		return badRequest("op: must be start, stop, restart or kill")
	}
	noteChange(w, id, body.Op)
	if !takesLock {
		return s.kill(ctx, id)
	}
	return s.change(ctx, id, run)
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

// handleDelete answers DELETE /service/{id} when everything that belonged to the service is removed.
func (s *services) handleDelete(w http.ResponseWriter, r *http.Request) error {
	noteChange(w, r.PathValue("id"), "delete")
	return s.remove(r.Context(), r.PathValue("id"))
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
